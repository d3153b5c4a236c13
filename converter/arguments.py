"""Arguments that several subcommands of convert-pruned have: which model, and in which format."""

import argparse
from pathlib import Path

from converter.importers import AUTO, importer_names
from pruned_vllm.common.arguments import positive_float


def add_source_arguments(parser: argparse.ArgumentParser, what: str, *, metavar: str = "INPUT") -> None:
    """Adds the positional `input`, which the help text calls `what`, and how it is to be read."""
    parser.add_argument("input", metavar=metavar, type=Path, help=what)
    parser.add_argument(
        "--from",
        dest="importer",
        choices=(AUTO, *importer_names()),
        default=AUTO,
        metavar="NAME",
        help=f"format of {metavar}; auto recognises it, or lists those that it may be; convert-pruned --help says what "
        "there is (default: %(default)s)",
    )
    parser.add_argument(
        "--base-model",
        metavar="DIR_OR_ID",
        help="dense model, for inputs that have masks only or lack its tokenizer; in place of any weights in "
        f"{metavar} and of the model that pruning.json names",
    )
    parser.add_argument(
        "--lora-alpha",
        type=positive_float,
        metavar="ALPHA",
        help="alpha that LoRA weights were trained with, for formats that do not store it (compresso, lorapruner, "
        "nuteprune); default: their rank, so that they are added as they are",
    )
    parser.add_argument(
        "--revision",
        metavar="NAME",
        help=f"commit, branch or tag of {metavar} where that is on the hub, else of the dense model; default: the main "
        "branch, or for the dense model the commit that pruning.json names",
    )
