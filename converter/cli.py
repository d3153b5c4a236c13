"""convert-pruned: a masked checkpoint, or what another project wrote, becomes a smaller one that vLLM serves.

convert-pruned ckpt/ out/
convert-pruned zs.pt out/ --from nuteprune --base-model meta-llama/Llama-2-7b-hf
convert-pruned inspect out/         # what it is, its sizes, what serving needs
vllm serve out/
"""

import argparse
import importlib
import re
import shlex
import sys
import textwrap
from pathlib import Path

from converter.arguments import add_source_arguments
from converter.importers import importer_summaries
from converter.quantize.arguments import add_quantization_arguments, wanted_quantization
from converter.quantize.schemes import require_library
from pruned_vllm.common.arguments import add_overwrite_argument, positive_int
from pruned_vllm.common.command import run_command
from pruned_vllm.common.directories import prepare_output
from pruned_vllm.common.environment import add_version_argument
from pruned_vllm.formats.layer import DEFAULT_ALIGNMENT

# Words in the place of INPUT, each with the module whose `main` does it. A directory of that name is ./inspect.
SUBCOMMANDS = {"inspect": "converter.inspect_command", "export": "converter.export_command"}

DESCRIPTION = """\
Folds learned masks into the weights, cuts out what they remove, and writes a checkpoint with every layer at its real
size. The result computes what the masked model computed. The table shows what is kept of every layer. INPUT is what
learn-masks wrote, or what another pruning project did."""
EXAMPLES = """\
examples:
  convert-pruned ckpt/ out/ && vllm serve out/
  convert-pruned nuteprune/epoch6/ out/ --from nuteprune --base-model meta-llama/Llama-2-7b-hf
  convert-pruned me/masked-model out/ --push-to-hub me/pruned-model
  convert-pruned ckpt/ out/ --quantize w8a8-int8     # and round the weights; afterwards: quantize-pruned --help
  convert-pruned inspect out/     # what it is, its sizes, what serving needs: convert-pruned inspect --help
  convert-pruned export out/ out.gguf     # for llama.cpp: convert-pruned export --help
"""


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if arguments and arguments[0] in SUBCOMMANDS:
        return importlib.import_module(SUBCOMMANDS[arguments[0]]).main(arguments[1:])
    return _main(arguments)


def _main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="convert-pruned",
        description=DESCRIPTION,
        epilog=f"{EXAMPLES}\n{_formats()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_version_argument(parser)
    add_source_arguments(
        parser,
        "directory, file or hub id: a masked checkpoint of learn-masks (pruning_masks.safetensors, pruning.json, and "
        "the dense model unless pruning.json names it), or what another project wrote (see below)",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="directory to write; must not exist (see --overwrite)")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the weights in OUT; auto keeps the one that each tensor has (default: %(default)s)",
    )
    parser.add_argument(
        "--gqa-layout",
        choices=("compact", "padded"),
        default="compact",
        help="what to do where the KV heads of a layer keep different numbers of query heads. compact writes the heads "
        "that are left, and needs the plugin; padded gives every KV head of a layer as many query heads as the one "
        "that has most, filled up with zeros, for software that reads per_layer_config but knows no uneven groups "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--align",
        type=positive_int,
        default=DEFAULT_ALIGNMENT,
        metavar="N",
        help="pad FFN widths, and a hidden size that shrinks, with zeros to multiples of N, which suits the "
        "tensor cores of GPUs; 1 pads nothing. %(default)s adds 32 channels to a layer on average, below 1%% of the "
        "weights of models of 0.5B parameters and more, and on CPU neither helps nor harms. Experts of different "
        "widths are not padded: they gain nothing (default: %(default)s)",
    )
    parser.add_argument(
        "--max-distinct-shapes",
        type=positive_int,
        metavar="K",
        help="pad layers until at most K different shapes are left, at the fewest bytes that can do it (the search may "
        "take two minutes); layers that come to share a shape get even query groups. Fewer shapes "
        "mean fewer graphs to compile at start-up, but more bytes to read at every step; --dry-run prints both "
        "(default: no limit)",
    )
    parser.add_argument(
        "--drop-empty-experts",
        action="store_true",
        help="remove experts without any channel left, and their rows of the router. Without it, which is exact, they "
        "stay and add zeros. With it tokens are sent to other experts in their place, as after REAP: the result is NOT "
        "the masked model, and the model card and config.json say so. Verified against the masked model whose routers "
        "choose among the experts that stay. Refused where fewer would be left than the router chooses",
    )
    add_quantization_arguments(parser, "--quantize", required=False)
    parser.add_argument(
        "--max-shard-size",
        type=_size,
        default="5GB",
        metavar="SIZE",
        help="largest size of a weight file, for example 500MB (default: %(default)s)",
    )
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        help="compare what was written with the pruned model before OUT appears: both are run on a few prompts in "
        "float32, the pruned model with its masks applied while it runs, and the worst difference of log-probabilities "
        "is printed. Nothing is written where a layer differs, from the same input, by more than 1e-4 of what it adds "
        "plus four times what rounding does: that is measured on the pruned model, whose weights are multiplied by "
        "random numbers, rounded to the dtype of OUT (float32, where neither masks nor casts round anything) and "
        "divided again. Reads the weights a few times. With --quantize, that is done for the weights before they are "
        "rounded, and each one is compared with what it became (default: --verify up to 2 GB of weights)",
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything and print the plan; write nothing")
    add_overwrite_argument(parser, "OUT")
    parser.add_argument(
        "--plot",
        action="store_true",
        help="draw the heads, FFN channels and experts that are left in every layer, into OUT/report "
        "(later: convert-pruned inspect OUT --plot). Needs Matplotlib",
    )
    parser.add_argument(
        "--push-to-hub",
        metavar="REPO",
        help="upload OUT with its model card to this model of the hub, for example me/my-model, once it is complete; "
        "needs `hf auth login`",
    )
    args = parser.parse_args(arguments)
    if args.push_to_hub is not None and args.dry_run:
        parser.error("--push-to-hub uploads what is written to OUT")
    if args.plot and args.dry_run:
        parser.error("--dry-run writes nothing, --plot does; leave out one of them")
    return run_command(parser.prog, lambda: _convert(args))


def _formats() -> str:
    """What --from can be, for --help: the first line of each importer's docstring, read without importing it."""
    lines = ["formats (--from):"]
    for name, summary in importer_summaries().items():
        first, others = f"  {name:<12}", " " * 14
        lines += textwrap.wrap(summary, 118, initial_indent=first, subsequent_indent=others, break_on_hyphens=False)
    return "\n".join(lines)


def _convert(args: argparse.Namespace) -> None:
    # Imported late: --help and wrong arguments should not wait for torch.
    import torch

    from converter.advice import serve_command, warnings
    from converter.convert import WRITER, convert
    from converter.plan import make_plan
    from converter.table import print_plan
    from converter.verify import VERIFIED_BYTES
    from pruned_vllm.formats.hub import upload
    from pruned_vllm.pattern import pattern_of_geometry, require_matplotlib, write_report

    if not args.dry_run:
        prepare_output(args.out, writer=WRITER, overwrite=args.overwrite)
    if args.plot:
        require_matplotlib()
    if (wanted := wanted_quantization(args)) is not None:
        require_library()
    plan = make_plan(
        args.input,
        args.base_model,
        importer=args.importer,
        dtype=None if args.dtype == "auto" else getattr(torch, args.dtype),
        revision=args.revision,
        settings={"lora_alpha": args.lora_alpha},
        gqa_layout=args.gqa_layout,
        alignment=args.align,
        max_distinct_shapes=args.max_distinct_shapes,
        drop_empty_experts=args.drop_empty_experts,
        quantize=wanted,
    )
    print_plan(plan)
    if not args.dry_run:
        verify = plan.bytes_of(plan.pruned) <= VERIFIED_BYTES if args.verify is None else args.verify
        found = convert(plan, args.out, overwrite=args.overwrite, max_shard_bytes=args.max_shard_size, verify=verify)
        print("\n".join(found) or "Not verified: --verify compares what was written with the pruned model.")
        if args.plot:
            write_report(pattern_of_geometry(plan.pruned), args.out)
        print(f"Wrote {args.out}. Serve it: {serve_command(plan, shlex.quote(str(args.out)))}")
        if args.push_to_hub is not None:
            print(f"Uploaded to {upload(args.out, args.push_to_hub)}")
    for warning in warnings(plan):
        print(f"convert-pruned: warning: {warning}", file=sys.stderr)


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip().upper())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 500MB or 5GB")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2] or " "))


if __name__ == "__main__":
    sys.exit(main())
