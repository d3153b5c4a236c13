"""The options of a quantization, which quantize-pruned and convert-pruned share. Pure Python."""

import argparse

from converter.quantize.schemes import GROUP_SIZES, SCHEMES, Wanted, scheme_text
from pruned_vllm.common.arguments import positive_int
from pruned_vllm.common.errors import InputError

CHANNEL = "channel"


def add_quantization_arguments(parser: argparse.ArgumentParser, scheme_option: str, *, required: bool) -> None:
    """Adds `scheme_option`, and what else a quantization needs, for `wanted_quantization`."""
    parser.add_argument(
        scheme_option,
        dest="scheme",
        choices=tuple(SCHEMES),
        required=required,
        help=f"{'how to round the weights' if required else 'also round the weights, as quantize-pruned does'}, each "
        f"to the nearest value. {scheme_text()}. lm_head, embeddings, norms and routers stay as they are",
    )
    sizes = ", ".join(map(str, GROUP_SIZES))
    parser.add_argument(
        "--group-size",
        type=_group_size,
        metavar=f"N|{CHANNEL}",
        help=f"of w4a16: inputs that share a scale; {CHANNEL} is one scale for each output (default: of {sizes} "
        "that divide the hidden size and the heads of every layer, what makes the smallest files)",
    )
    parser.add_argument(
        "--tensor-parallel-size",
        type=positive_int,
        metavar="N",
        help="ranks that the result is for: FFN widths are padded so that each rank gets what kernels want "
        "(default: 1)",
    )
    parser.add_argument(
        "--ignore",
        nargs="+",
        metavar="LAYER",
        help="linear layers that stay as they are: full names, or regular expressions behind re:, such as "
        "'re:.*down_proj'",
    )


def wanted_quantization(args: argparse.Namespace) -> Wanted | None:
    """What the options of convert-pruned say; None where no scheme is named.

    Raises:
        InputError: other options are given, which then say nothing.
    """
    if args.scheme is not None:
        return required_quantization(args)
    given = {
        "--group-size": args.group_size,
        "--tensor-parallel-size": args.tensor_parallel_size,
        "--ignore": args.ignore,
    }
    if unused := [option for option, value in given.items() if value is not None]:
        raise InputError(f"{', '.join(unused)}: only with --quantize, which names a scheme")
    return None


def required_quantization(args: argparse.Namespace) -> Wanted:
    """What the options say, a scheme among them."""
    ranks = args.tensor_parallel_size or 1
    return Wanted(SCHEMES[args.scheme], args.group_size, ranks, tuple(args.ignore or ()))


def _group_size(text: str) -> int:
    """0 is a scale for each output."""
    return 0 if text == CHANNEL else positive_int(text)
