"""convert-pruned inspect: what a directory or file is, and what its model costs.

convert-pruned inspect out/
convert-pruned inspect flap/ --json
convert-pruned inspect out/ --plot      # pictures of what is left, in out/report/
"""

import argparse
import json
import textwrap
from typing import TYPE_CHECKING

from converter.arguments import add_source_arguments
from converter.inspection_keys import JSON_KEYS
from pruned_vllm.common.command import run_command
from pruned_vllm.common.errors import InputError

if TYPE_CHECKING:  # --help should not wait for torch
    from converter.inspection import Inspection

DESCRIPTION = """\
Says what PATH is: a converted model, a stock one, or anything that convert-pruned reads. Prints the sizes of every
layer, what a token takes in the KV cache, what serving needs, and what pruning gains at best. Loads no weights. Of
what is still to be converted it prints the sizes without padding, as --align 1 writes them."""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="convert-pruned inspect",
        description=DESCRIPTION,
        epilog=_json_keys(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_source_arguments(parser, "directory, file or hub id, which is downloaded", metavar="PATH")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print one JSON object with the keys below")
    output.add_argument(
        "--plot",
        action="store_true",
        help="also draw the heads, FFN channels and experts that are left of a converted model, into PATH/report. "
        "Needs Matplotlib",
    )
    args = parser.parse_args(argv)
    return run_command(parser.prog, lambda: _inspect(args))


def _json_keys() -> str:
    lines = ["keys of --json:"]
    for keys, meaning in JSON_KEYS.items():
        lines += textwrap.wrap(f"{keys}: {meaning}", 118, initial_indent="  ", subsequent_indent="      ")
    return "\n".join(lines)


def _inspect(args: argparse.Namespace) -> None:
    from converter.inspection import inspect
    from converter.inspection_text import print_inspection

    settings = {"lora_alpha": args.lora_alpha}
    found = inspect(args.input, args.base_model, importer=args.importer, revision=args.revision, settings=settings)
    if args.json:
        print(json.dumps(found.as_json(), indent=2))
        return
    print_inspection(found)
    if args.plot:
        _plot(found)


def _plot(found: "Inspection") -> None:
    from pruned_vllm.pattern import pattern_of_geometry, write_report

    if found.kind != "converted":
        raise InputError(f"{found.path} is no converted model; add --plot when you convert it, or learn with --report")
    if found.geometry.is_dense:
        heads = [layer.num_attention_heads for layer in found.geometry.layers]
        raise InputError(
            f"{found.path}: all layers are equal ({max(heads)} query heads), and "
            "config.json does not say what they were before; add --plot when you convert it, or learn with --report"
        )
    print(f"Wrote {write_report(pattern_of_geometry(found.geometry), found.path)}")
