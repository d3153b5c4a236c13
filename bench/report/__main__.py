"""Writes report.md and report.html of results, or compares two of them.

    python -m bench.report results/e2e_speedup.json results/online_speedup.json --output-dir results
    python -m bench.report --compare before/e2e_speedup.json after/e2e_speedup.json --output-dir results

report.html opens from disk and needs no network. A comparison tells which cases changed beyond their intervals, and
what differs in models, settings, versions and hardware, which can make it void.
"""

import argparse
import sys
from pathlib import Path

from bench.report.reports import comparison_report, write_report
from bench.report.results import read_results
from bench.report.write import write
from pruned_vllm.common.command import run_command


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("results", type=Path, nargs="*", metavar="RESULT.json", help="what the benchmarks wrote, a chapter each")
    add("--compare", type=Path, nargs=2, metavar=("A.json", "B.json"), help="two results of the same kind: B against A")
    add("--output-dir", type=Path, default=Path("results"), metavar="DIR", help="created; default: results")
    args = parser.parse_args(argv)
    if bool(args.results) == bool(args.compare):
        parser.error("name results, or two of them after --compare")
    return run_command(parser.prog, lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    if args.compare:
        report, warnings = comparison_report(*read_results(args.compare))
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
        paths = write(report, args.output_dir)
    else:
        paths = write_report(args.results, args.output_dir)
    print(f"written: {', '.join(map(str, paths))}")


if __name__ == "__main__":
    sys.exit(main())
