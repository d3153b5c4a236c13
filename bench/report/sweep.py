"""The chapter of a result of bench.sweep: speed against what was removed, for several models and patterns."""

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from bench.report.comparison import Measure
from bench.report.content import Block, Chapter, Figure, Section, Table, Text, Warnings
from bench.report.drawing import COLOURS, in_style, new_figure, to_svg
from bench.report.models import counted, raw_section, setting_section
from bench.report.offline import IDEAL, mode
from bench.report.results import Result, speedup_text
from bench.speed.statistics import named_warnings

MARKERS = {"unpruned": "s", "uniform": "o", "ragged": "D"}
SHIFTS = {"unpruned": 0, "uniform": -0.6, "ragged": 0.6}  # percent, so that marks do not hide each other
PATTERN_COLOURS = {"unpruned": "ink", "uniform": "dense", "ragged": "pruned"}
OF_UNIFORM = (
    "Ragged against uniform: the speed of the ragged model over that of the uniform one beside it, run by run, less "
    "what their ideals differ by, since equal widths cannot have exactly the same size. 1.00 means that widths of all "
    "kinds cost no more than equal ones. A uniform model is served by vLLM's own class, a ragged one by this "
    "project's: what that alone makes is in the cell that is unpruned."
)

Cell = Mapping[str, Any]


def sweep_chapter(result: Result, key: str) -> Chapter:
    """`key` begins the ids of its figures."""
    content = result.content
    sections = [Section("Speedup against ideal", _speedup_blocks(content["cells"], key))]
    sources = [cell["paper"]["source"] for cell in content["cells"] if cell.get("paper")]
    if sources:
        sections.append(Section("Beside the paper's figures", _paper_blocks(content["cells"], sources[0])))
    sections += [
        Section("How it was measured", [Text(_method(content)), Text(IDEAL)]),
        setting_section(content),
        raw_section(result),
    ]
    return Chapter(f"Sweep: {result.name}", sections)


def _speedup_blocks(cells: Sequence[Cell], key: str) -> list[Block]:
    warnings = [warning for cell in cells for warning in named_warnings(cell["cases"], f"{cell['name']}, ")]
    blocks: list[Block] = [Warnings(warnings)] if warnings else []
    blocks.append(Text("Weights are random: they take as long as trained ones of these shapes."))
    for number, (model, of_model) in enumerate(_by_model(cells)):
        caption = f"{model}: lines are the ideal, marks are measured, whiskers 95 % intervals."
        blocks.append(Figure(_sweep_svg(of_model, f"{key}-model{number}"), caption))
    if any("of_uniform" in case for cell in cells for case in cell["cases"]):
        blocks.append(Text(OF_UNIFORM))
    header = (
        "cell",
        "case",
        "parameters removed",
        "speedup (95 % interval)",
        "ideal",
        "of ideal",
        "ragged against uniform",
    )
    return [*blocks, Table(header, [_row(cell, case) for cell in cells for case in cell["cases"]])]


def _row(cell: Cell, case: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        cell["name"],
        case["name"],
        f"{1 - cell['parameters'] / cell['dense_parameters']:.1%}",
        speedup_text(case),
        f"{case['ideal_speedup']:.2f}x",
        f"{case['of_ideal']:.2f}",
        speedup_text(case["of_uniform"]).replace("x", "") if case.get("of_uniform") else "-",
    )


def _by_model(cells: Sequence[Cell]) -> list[tuple[str, list[Cell]]]:
    return [(model, list(found)) for model, found in groupby(cells, key=lambda cell: cell["model"])]


@in_style
def _sweep_svg(cells: Sequence[Cell], name: str) -> str:
    cases = [case["name"] for case in cells[0]["cases"]]
    figure, axes = new_figure(1.75 * len(cases), len(cases), sharex=True)
    for number, case in enumerate(cases):
        _draw(axes[number], cells, number, case, legend=not number)
    axes[-1].set_xlabel("removed of heads and channels, %")
    return to_svg(figure, name, f"Speedup of {cells[0]['model']} over sparsity, measured and ideal")


@in_style
def plotted_figures(cells: Sequence[Cell]) -> str:
    """What `plot_sweep` draws, as JSON. It is in the picture too, so that one can tell whether it is up to date."""
    keys = ("speedup", "speedup_low", "speedup_high", "ideal_speedup")
    figures = {cell["name"]: [[round(case[key] or 0, 4) for key in keys] for case in cell["cases"]] for cell in cells}
    return json.dumps(figures)


def plot_sweep(cells: Sequence[Cell], path: Path) -> None:
    """Writes a picture of all cells: a column for each model, a row for each case."""
    from matplotlib.figure import Figure as Canvas

    models = _by_model(cells)
    cases = [case["name"] for case in cells[0]["cases"]]
    figure = Canvas(figsize=(3.4 * len(models), 2.1 * len(cases)), layout="constrained", facecolor="white")
    axes = figure.subplots(len(cases), len(models), squeeze=False, sharex=True)
    for column, (model, of_model) in enumerate(models):
        for row, case in enumerate(cases):
            _draw(axes[row, column], of_model, row, f"{model}, {case}", legend=not row and not column)
        axes[-1, column].set_xlabel("removed of heads and channels, %")
    figure.savefig(path, dpi=120, metadata={"Description": plotted_figures(cells)})


def _draw(axes, cells: Sequence[Cell], number: int, title: str, legend: bool) -> None:
    """Speedup over sparsity of one case: the ideal of ragged cells as a line, a mark for every cell."""
    ideals = {0: 1.0} | {cell["sparsity"]: cell["cases"][number]["ideal_speedup"] for cell in cells}
    axes.plot(list(ideals), list(ideals.values()), color=COLOURS["ideal"], linewidth=2, label="ideal")
    for pattern, marker in MARKERS.items():
        found = [(cell["sparsity"], cell["cases"][number]) for cell in cells if cell["pattern"] == pattern]
        if not found:
            continue
        places = [sparsity + SHIFTS[pattern] for sparsity, _ in found]
        speedups = [case["speedup"] for _, case in found]
        whiskers = [
            [abs((case[end] or case["speedup"]) - case["speedup"]) for _, case in found]
            for end in ("speedup_low", "speedup_high")
        ]
        style = {"color": COLOURS[PATTERN_COLOURS[pattern]], "markersize": 5, "linewidth": 0, "elinewidth": 1.4}
        axes.errorbar(places, speedups, yerr=whiskers, fmt=marker, label=pattern, **style)
    axes.set_title(title)
    axes.set_ylabel("speedup")
    highest = max([*ideals.values(), *(cell["cases"][number]["speedup"] for cell in cells)])
    axes.set_ylim(0, 1.12 * highest)
    axes.grid(linewidth=0.6)
    if legend:
        axes.legend(loc="lower right", ncols=2, fontsize=8, handletextpad=0.4, borderaxespad=0.2)


def _paper_blocks(cells: Sequence[Cell], source: str) -> list[Block]:
    text = (
        f"The figures of {source} are requests per second of 1,000 ShareGPT prompts under vLLM on its own GPU, over "
        "those of the dense model. Ours are ratios of single cases, so the two need not be equal; the ideal says what "
        "a case allows. A dash: the paper prints nothing there. Ideal at full depth: what the case allows the model "
        "with all its layers, where some were cut to fit into this machine."
    )
    rows = []
    for cell in cells:
        depth = f"{cell['num_hidden_layers']} of {cell['full_num_hidden_layers']}"
        paper = cell.get("paper")
        printed = f"{paper['speedup']:.2f}x, {paper['device']}, {paper['where']}" if paper else "-"
        for case in cell["cases"]:
            full = case.get("full_depth_ideal_speedup") or case["ideal_speedup"]
            ideals = (f"{case['ideal_speedup']:.2f}x", f"{full:.2f}x")
            model = f"{cell['model']}, {cell['sparsity']} %"
            rows.append((model, depth, case["name"], printed, speedup_text(case), *ideals))
    header = ("model, removed", "layers", "case", "paper", "ours (95 % interval)", "ideal", "ideal at full depth")
    return [Text(text), Table(header, rows)]


def _method(content: Mapping[str, Any]) -> str:
    settings = content["settings"]
    pairs = counted(settings["repeats"] * settings["rounds"], "pair")
    return (
        "Several pruned models and their dense original were loaded into vLLM engines on the same machine at the "
        f"same time and ran the same cases in turns ({mode(settings)}). A speedup is the median of the ratios of "
        f"{pairs} of runs of the same turn. Unpruned is the dense model through this project's class: what it gains is "
        "no gain of pruning."
    )


def sweep_measures(result: Result) -> list[Measure]:
    """The speedup of each cell in each case."""
    return [
        Measure(
            f"{cell['name']}, {case['name']}", case["speedup"], "x", case["speedup_low"], case["speedup_high"], True
        )
        for cell in result.content["cells"]
        for case in cell["cases"]
    ]
