"""Writes what was measured into README.md and bench/README.md, from the JSON files in bench/results.

    python -m bench.tables             # after a new measurement, and after an edit of this package
    python -m bench.tables --check     # says which blocks are not what the JSON files say; exit code 2

A block is what stands between `<!-- measured: NAME -->` and `<!-- end -->`; the function of that name makes it, see
bench/tables/blocks.py. Write no figure that was measured elsewhere than in such a function: a test refuses it.
"""

import argparse
import sys

from bench.tables.blocks import DOCUMENTS, stale_blocks, with_blocks
from pruned_vllm.common.command import run_command
from pruned_vllm.common.errors import InputError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tables", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(argv)
    return run_command(parser.prog, lambda: _check() if args.check else _write())


def _check() -> None:
    stale = [f"{path}: {name}" for path in DOCUMENTS for name in stale_blocks(path.read_text(encoding="utf-8"))]
    if stale:
        raise InputError("These blocks are not what bench/results says; run python -m bench.tables:", stale)


def _write() -> None:
    for path in DOCUMENTS:
        path.write_text(with_blocks(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
