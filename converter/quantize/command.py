"""quantize-pruned: a model that convert-pruned wrote, or a stock one, in fewer bits.

quantize-pruned out/ small/ --scheme w8a8-int8
vllm serve small/
"""

import argparse
import shlex
import sys
from pathlib import Path

from converter.quantize.arguments import add_quantization_arguments, required_quantization
from converter.quantize.schemes import require_library
from pruned_vllm.common.arguments import add_overwrite_argument
from pruned_vllm.common.command import run_command
from pruned_vllm.common.directories import prepare_output
from pruned_vllm.common.environment import add_version_argument

WRITER = "quantize-pruned"  # whose output only this command replaces

DESCRIPTION = """\
Rounds the weights of a model to fewer bits and writes them as compressed-tensors does, so that vLLM serves them. Every
layer keeps its own size; FFN channels of zeros are added where kernels want other widths. Needs no vLLM and no data.
For GPTQ, AWQ and SmoothQuant, which look at data, converter/quantize/README.md has a recipe."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=WRITER, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_version_argument(parser)
    parser.add_argument("model", metavar="OUT", type=Path, help="what convert-pruned wrote, or a stock model")
    parser.add_argument("out", metavar="QUANTIZED", type=Path, help="directory to write; must not exist")
    add_quantization_arguments(parser, "--scheme", required=True)
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        help="compare every weight that was written with the one it was made of, before QUANTIZED appears: none may be "
        "off by more than half a step, and the errors are printed beside those that rounding predicts. Where widths "
        "were padded, the padded model is compared with OUT as convert-pruned does it (default: --verify up to 2 GB "
        "of weights)",
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything and print the plan; write nothing")
    add_overwrite_argument(parser, "QUANTIZED")
    args = parser.parse_args(argv)
    return run_command(WRITER, lambda: _quantize(args))


def _quantize(args: argparse.Namespace) -> None:
    require_library()
    # Imported late: --help and wrong arguments should not wait for torch.
    from converter.advice import serve_command, warnings
    from converter.convert import convert
    from converter.quantize.converted import plan_of_converted
    from converter.quantize.report import print_quantization, quantized_card
    from converter.verify import VERIFIED_BYTES

    if not args.dry_run:
        prepare_output(args.out, writer=WRITER, overwrite=args.overwrite)
    plan = plan_of_converted(args.model, required_quantization(args))
    print_quantization(plan)
    if not args.dry_run:
        verify = plan.bytes_of(plan.pruned) <= VERIFIED_BYTES if args.verify is None else args.verify
        found = convert(plan, args.out, overwrite=args.overwrite, verify=verify, writer=WRITER, card=quantized_card)
        print("\n".join(found) or "Not verified: --verify compares what was written with the model.")
        print(f"Wrote {args.out}. Serve it: {serve_command(plan, shlex.quote(str(args.out)))}")
    for warning in warnings(plan):
        print(f"{WRITER}: warning: {warning}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
