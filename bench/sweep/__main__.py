"""Times pruned models of rising sparsity, ragged and uniform, against their dense originals, on real vLLM.

    python -m bench.sweep --dry-run                 # what would be measured, and how long it takes
    python -m bench.sweep                           # 0, 20, 50 and 70 % x {uniform, ragged} x {MHA, GQA, MoE}
    python -m bench.sweep --sparsities 0 10 20 30 40 50 60 70
    python -m bench.sweep --only 'gqa_*_50' --cases decode:8:32:64
    python -m bench.sweep --only moe_ragged_50 --write-models    # then: python -m bench.breakdown --load-format dummy
    python -m bench.sweep --paper                   # the DDP paper's models at 20, 40, 50 and 60 %

Weights are random. Ragged keeps another share in every layer (bench/sweep/patterns.py); uniform has equal layers and
the nearest size that steps of --align allow (experts of few channels: up to 9 % apart). At 0 % it is the dense model
through the plugin's class, which tells what of a gain is not pruning. Each cell goes to a file in OUTPUT_DIR/cells as
soon as its group of engines is done; the same command goes on where it was stopped, on the same machine with the same
libraries. sweep.json, sweep.png, report.md and report.html sum up. Two engines of one model differ by a few percent for
as long as they live; --rounds starts all of them several times, and intervals then cover that.

--paper keeps the real widths and cuts layers until the engines fit into memory; on a GPU that holds both models nothing
is cut. The paper's figures are requests per second of ShareGPT prompts on its own GPU, ours are ratios of single cases.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from bench.speed.setting import Setting, add_cases_argument
from bench.sweep import plan
from bench.sweep.cells import Cell, chosen, grid_cells, paper_cells
from bench.sweep.run import finished_cells, measure_group
from bench.sweep.shapes import PAPER_SHAPES, SMALLEST_HIDDEN_SIZE, grid_shapes
from bench.sweep.summary import printed, summary
from pruned_vllm.common.arguments import positive_int
from pruned_vllm.common.command import run_command
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import write_json
from pruned_vllm.formats.ideal import ideal_speedup
from pruned_vllm.formats.layer import DEFAULT_ALIGNMENT

DEFAULT_CASES = ("decode:1:32:16", "decode:8:32:16", "decode:32:8:16", "prefill:1:512")
DEFAULT_SPARSITIES = (0, 20, 50, 70)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--paper", action="store_true", help="the DDP paper's models and sparsities instead of the grid, ragged")
    add("--sparsities", type=int, nargs="+", metavar="PERCENT", help="of the grid; default: 0 20 50 70")
    add("--hidden-size", type=positive_int, help="of the grid's models; default: 1536, with experts 1024")
    add("--num-hidden-layers", type=positive_int, help="default: 16, with experts 8; --paper: as many as fit")
    add("--align", type=positive_int, default=DEFAULT_ALIGNMENT, help="as of convert-pruned; default: %(default)s")
    add("--only", nargs="+", metavar="CELL", help="names of cells, * and ? allowed, e.g. 'gqa_*_50'; default: all")
    add_cases_argument(parser, DEFAULT_CASES)
    add("--repeats", type=positive_int, default=5, help="runs per case and engine after one warm-up; default: 5")
    add("--rounds", type=positive_int, default=1, help="times that all engines are started anew; default: 1")
    add("--eager", action="store_true", help="no compilation; default: compiled, as vllm serve does")
    add("--dry-run", action="store_true", help="print cells, sizes, ideal speedups and the time needed, and stop")
    add(
        "--write-models",
        action="store_true",
        help="write each cell's config.json and that of its dense model into OUTPUT_DIR/models, for bench.breakdown "
        "and the other benchmarks with --load-format dummy, and stop",
    )
    add("--output-dir", type=Path, metavar="DIR", help="created; default: results/sweep, with --paper results/paper")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.paper and (args.sparsities or args.hidden_size):
        parser.error("--paper has sparsities and widths of its own: leave --sparsities and --hidden-size out")
    if args.hidden_size and args.hidden_size % SMALLEST_HIDDEN_SIZE:
        parser.error(f"--hidden-size must be a multiple of {SMALLEST_HIDDEN_SIZE}, so that query groups come out even")
    args.output_dir = args.output_dir or Path("results", "paper" if args.paper else "sweep")
    return run_command(parser.prog, lambda: _run(args, argv))


def _run(args: argparse.Namespace, argv: list[str] | None) -> None:
    setting = Setting(
        cases=args.cases,
        repeats=args.repeats,
        rounds=args.rounds,
        load_format="dummy",
        dtype="bfloat16",
        compile=not args.eager,
    )
    machine = plan.this_machine()
    cells = sweep_cells(args, machine)
    wanted = chosen(cells, args.only) if args.only else cells
    if args.write_models:
        _write_models(wanted, args.output_dir / "models")
        return
    records = {} if args.dry_run else finished_cells(cells, setting, args.output_dir)
    groups = plan.groups([cell for cell in wanted if cell.name not in records], args.cases, machine.memory_bytes)
    print_plan(wanted, groups, setting, machine, done=records)
    if args.dry_run:
        return
    for group in groups:
        print(f"measuring {', '.join(cell.name for cell in group)}", flush=True)
        records |= measure_group(group, setting, args.output_dir)
    command = shlex.join(["python", "-m", "bench.sweep", *(sys.argv[1:] if argv is None else argv)])
    measured = [cell for cell in cells if cell.name in records]
    _sum_up({"command": command, **summary(measured, records, args.align, args.paper)}, args.output_dir)


def _write_models(cells: Sequence[Cell], directory: Path) -> None:
    for cell in cells:
        for name, config in ((f"{cell.model.lower()}_dense", cell.config), (cell.name, cell.pruned_config)):
            (directory / name).mkdir(parents=True, exist_ok=True)
            write_json(directory / name / "config.json", config)
    print(f"written: {', '.join(map(str, sorted(directory.iterdir())))}")


def sweep_cells(args: argparse.Namespace, machine: plan.Machine) -> list[Cell]:
    """All cells that the options ask for."""
    if not args.paper:
        shapes = grid_shapes(args.hidden_size, args.num_hidden_layers)
        return grid_cells(shapes, args.sparsities or DEFAULT_SPARSITIES, args.align)
    cells = []
    for model, config in PAPER_SHAPES.items():
        full = config["num_hidden_layers"]
        cells_at = partial(paper_cells, model, align=args.align)
        depth = args.num_hidden_layers or plan.depth_that_fits(cells_at, full, args.cases, machine.memory_bytes)
        if depth > full:
            raise InputError(f"--num-hidden-layers {depth}: {model} has {full}")
        cells += cells_at(depth)
    return cells


def print_plan(
    cells: Sequence[Cell], groups: Sequence[Sequence[Cell]], setting: Setting, machine: plan.Machine, done: dict
) -> None:
    """What will be measured, in which groups, and about how long it takes."""
    from rich.console import Console

    from bench.speed.report import numbers_table

    ideals_of = [f"ideal\n{case.name}" for case in setting.cases]
    table = numbers_table("cell", "layers", "dense", "pruned", *ideals_of, "paper", "group")
    numbers = {cell.name: str(number) for number, group in enumerate(groups, 1) for cell in group}
    for cell in cells:
        ideals = [ideal_speedup(cell.dense, cell.pruned, case, plan.ELEMENT_BYTES) for case in setting.cases]
        paper = printed(cell)
        table.add_row(
            cell.name,
            f"{len(cell.pruned.layers)} of {cell.full_depth}",
            *(f"{geometry.num_parameters / 1e6:,.0f}M" for geometry in (cell.dense, cell.pruned)),
            *(f"{ideal:.2f}x" for ideal in ideals),
            f"{paper['speedup']:.2f}x" if paper else "-",
            "done" if cell.name in done else numbers[cell.name],
        )
    Console(width=max(100, 60 + 16 * len(setting.cases))).print(table)
    total = 0.0
    for number, group in enumerate(groups, 1):
        needed = plan.seconds(group, setting, machine)
        total += needed
        memory = plan.group_bytes(group, setting.cases) / plan.GIB
        print(f"group {number}: {len(group) + 1} engines, {memory:.1f} GiB, about {needed / 60:.0f} minutes")
    rates = (
        f"{machine.gb_per_s:g} GB/s, {machine.tflop_per_s:g} TFLOP/s, {machine.start_seconds[not setting.compile]:g} s"
    )
    print(f"about {total / 60:.0f} minutes in all, if this machine reaches {rates} per start of an engine", flush=True)


def results_table(cells: Sequence[dict]):
    """What was measured, a line for each cell and case."""
    from bench.speed.report import numbers_table
    from bench.speed.statistics import interval_text

    table = numbers_table("cell", "case", "speedup", "95 %", "ideal", "of ideal", "ragged against\nuniform")
    for cell in cells:
        for case in cell["cases"]:
            interval = interval_text(case, "-")
            against = f"{case['of_uniform']['speedup']:.2f}" if "of_uniform" in case else "-"
            figures = f"{case['speedup']:.2f}x", interval, f"{case['ideal_speedup']:.2f}x", f"{case['of_ideal']:.2f}"
            table.add_row(cell["name"], case["name"], *figures, against)
    return table


def _sum_up(results: dict, output_dir: Path) -> None:
    from rich.console import Console

    from bench.report.reports import report_beside
    from bench.report.sweep import plot_sweep

    Console(width=100).print(results_table(results["cells"]))
    path, plot_path = output_dir / "sweep.json", output_dir / "sweep.png"
    write_json(path, results)
    plot_sweep(results["cells"], plot_path)
    print(f"written: {', '.join(map(str, [path, plot_path, *report_beside(path)]))}")


if __name__ == "__main__":
    sys.exit(main())
