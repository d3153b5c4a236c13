"""The chapter of a result of bench/e2e_speedup.py: fixed batches, dense against pruned."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from bench.report.comparison import Measure
from bench.report.content import Block, Chapter, Figure, Fold, Section, Table, Text, Warnings, significant
from bench.report.figures import Gain, limits_figure, samples_figure, speedup_figure
from bench.report.models import counted, model_section, raw_section, setting_section
from bench.report.results import Result, speedup_text, with_interval
from bench.speed.statistics import median_interval, named_warnings, ratios

SIDES = {"dense": "dense", "dense, our class": "plugin_dense", "pruned": "pruned"}  # keys of a case by their names

IDEAL = (
    "Ideal is what a perfect runtime would reach: for decode the bytes that a step reads, for prefill the "
    "floating-point operations, of the dense model over those of the pruned one. It counts what pruning cannot touch "
    "too (lm_head, embedding rows, norms, routers, shared experts) and the KV cache."
)


def offline_chapter(result: Result, key: str) -> Chapter:
    """`key` begins the ids of its figures."""
    content = result.content
    cases = [with_interval(case) for case in content["cases"]]
    sections = [
        Section("Speedup against ideal", _speedup_blocks(content, cases, key)),
        Section("How it was measured", [Text(_method(content, cases)), Text(IDEAL), *_samples(cases, key)]),
        *roofline_sections(content, cases, key),
        *_plugin_sections(cases),
        model_section(content["models"], key),
        setting_section(content),
        raw_section(result),
    ]
    return Chapter(f"Offline: {result.name}", sections)


def _speedup_blocks(content: Mapping[str, Any], cases: Sequence[Mapping[str, Any]], key: str) -> list[Block]:
    blocks: list[Block] = [Text(_summary(cases))]
    # Those of the whole result, then those of its cases.
    if warnings := [*(content.get("warnings") or []), *named_warnings(content["cases"])]:
        blocks.append(Warnings(warnings))
    if content["settings"].get("load_format") == "dummy":
        blocks.append(Text("Weights are random: they take as long as trained ones of these shapes."))
    header = ("case", "speedup (95 % interval)", "ideal", "of ideal", "dense", "pruned")
    rows = [
        (
            case["name"],
            speedup_text(case),
            f"{case['ideal_speedup']:.2f}x",
            f"{case['of_ideal']:.2f}",
            *(f"{case[side]['throughput_tokens_per_s']:,.1f} tok/s" for side in ("dense", "pruned")),
        )
        for case in cases
    ]
    caption = (
        "Diamonds are measured medians, lines their 95 % intervals, pale dots single pairs of runs; the bar ends at "
        "the ideal. The line at 1 is as fast as the dense model."
    )
    gains = [
        Gain(
            case["name"],
            case["speedup"],
            case["speedup_low"],
            case["speedup_high"],
            ratios(case["dense"]["samples_s"], case["pruned"]["samples_s"]),
            (0, case["ideal_speedup"]),
        )
        for case in cases
    ]
    return [*blocks, Table(header, rows), Figure(speedup_figure(gains, f"{key}-speedup"), caption)]


def _summary(cases: Sequence[Mapping[str, Any]]) -> str:
    speedups, shares = ([case[key] for case in cases] for key in ("speedup", "of_ideal"))
    return (
        f"The pruned model is {min(speedups):.2f} to {max(speedups):.2f} times as fast as the dense one, which is "
        f"{min(shares):.0%} to {max(shares):.0%} of what its sizes allow."
    )


def mode(settings: Mapping[str, Any]) -> str:
    """How the engines of a result ran."""
    return "compiled, as vLLM serves by default" if settings.get("compile") else "eager, without compilation"


def _method(content: Mapping[str, Any], cases: Sequence[Mapping[str, Any]]) -> str:
    pairs = counted(len(cases[0]["dense"]["samples_s"]), "pair")
    rounds = content["settings"].get("rounds", 1)
    again = f" All engines were started {rounds} times." if rounds > 1 else ""
    return (
        "Dense and pruned model were loaded into two vLLM engines on the same machine at the same time and ran the "
        f"same cases in turns ({mode(content['settings'])}). Times are those of vLLM's engine core. A speedup is the "
        f"median of the ratios of {pairs} of neighbouring runs, so that a slow phase of the machine hits both "
        f"sides.{again}"
    )


def _samples(cases: Sequence[Mapping[str, Any]], key: str) -> list[Block]:
    caption = "Every run of both models; each model's own spread shows how quiet the machine was."
    rows = [
        (f"{case['name']}, {side}", ", ".join(significant(seconds, 4) for seconds in case[side]["samples_s"]))
        for case in cases
        for side in ("dense", "pruned")
    ]
    table = Table(("case", "seconds of each run, in order"), rows)
    return [Figure(samples_figure(cases, f"{key}-samples"), caption), Fold("All times", [table])]


def roofline_sections(content: Mapping[str, Any], cases: Sequence[Mapping[str, Any]], key: str) -> list[Section]:
    """How near both models are to what this machine was measured to do; nothing where the result does not say."""
    machine = content.get("machine")
    if not machine or "of_bandwidth" not in cases[0]["dense"]:
        return []
    rows = [
        (
            case["name"],
            side,
            f"{record['step_s'] * 1e3:,.2f} ms",
            f"{record['gb_per_s']:,.1f} GB/s",
            f"{record['of_bandwidth']:.0%}",
            f"{significant(record['tflop_per_s'])} TFLOP/s",
            f"{record['of_gemm_rate']:.0%}",
        )
        for case in cases
        for side, record in sides(case).items()
    ]
    header = ("case", "model", "step", "reads", "of bandwidth", "computes", "of GEMM rate")
    threads = counted(machine["threads"], "thread")
    limits = (
        f"This machine was measured to read {machine['bandwidth_gb_per_s']:,.1f} GB/s and to multiply "
        f"{significant(machine['gemm_tflop_per_s'])} TFLOP/s in {machine['dtype']}, on {threads}, in the dense "
        "model's engine while nothing else ran. The larger share tells what binds; what both models lack to 100 % is "
        "time that the runtime loses, whatever the widths."
    )
    caption = "Share of the limit that binds: memory bandwidth or matrix products."
    figure = Figure(limits_figure(cases, f"{key}-limits"), caption)
    return [Section("How near the limits of the machine", [Text(limits), Table(header, rows), figure])]


def sides(case: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The records of the models that ran this case, by name."""
    return {name: case[key] for name, key in SIDES.items() if key in case}


def _plugin_sections(cases: Sequence[Mapping[str, Any]]) -> list[Section]:
    """What of the gain is not pruning, where the dense model was timed in the plugin's class too."""
    records = [(case["name"], case["plugin_dense"], case) for case in cases if "plugin_dense" in case]
    if not records:
        return []
    rows = [(name, speedup_text(record), speedup_text(case)) for name, record, case in records]
    text = (
        "The dense model's weights, served by this project's model class instead of vLLM's own. What that gains over "
        "vLLM's dense model is no gain of pruning."
    )
    return [Section("What is not pruning", [Text(text), Table(("case", "dense, our class", "pruned"), rows)])]


def offline_measures(result: Result) -> list[Measure]:
    """The speedup of each case, and the time of each model in it."""
    found = []
    rounds = result.content["settings"].get("rounds", 1)
    for case in map(with_interval, result.content["cases"]):
        low, high = case["speedup_low"], case["speedup_high"]
        found.append(Measure(f"{case['name']}, speedup", case["speedup"], "x", low, high, more_is_better=True))
        for side, record in sides(case).items():
            samples = [seconds * 1e3 for seconds in record["samples_s"]]
            low, high = median_interval(samples, rounds) or (None, None)
            found.append(Measure(f"{case['name']}, {side}", median(samples), "ms", low, high, more_is_better=False))
    return found
