"""The chapter of a result of bench/online_speedup.py: two servers under the same traffic."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from bench.report.comparison import Measure
from bench.report.content import Block, Chapter, Code, Figure, Section, Table, Text, Warnings, significant
from bench.report.figures import Gain, latency_figure, speedup_figure
from bench.report.models import model_section, raw_section, setting_section, shown
from bench.report.results import Result, speedup_text
from bench.speed.memory import GIB
from bench.speed.statistics import median_interval, named_warnings, ratios

LATENCIES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "time between tokens",
    "e2e": "whole request",
}
PERCENTILES = ("p50", "p90", "p99")
SIDES = ("dense", "pruned")
IDEAL = (
    "Ideal is what a perfect runtime would gain, counted from sizes alone. It is a bracket: a server's time goes into "
    "prompts, which cost floating-point operations, and into output tokens, which cost reading weights and KV cache; "
    "how much into which depends on the machine. Bytes count at the batch that each server reached."
)
START_NOTE = (
    "Every start is a single measurement. The dense server started first, so its first start also brought vLLM's "
    "libraries into memory, and the pruned one's found them there; whose weights lay in the page cache is not known. A "
    "shorter first start is no gain of pruning."
)

Scenario = Mapping[str, Any]


def online_chapter(result: Result, key: str) -> Chapter:
    """`key` begins the ids of its figures."""
    content = result.content
    scenarios = content["scenarios"]
    doubts = named_warnings(scenarios)
    warnings = [Warnings(doubts)] if doubts else []
    sections = [
        Section("Requests per second", [*warnings, *_throughput_blocks(scenarios, key)]),
        Section("Latency", _latency_blocks(scenarios, key)),
        Section("How it was measured", [Text(_method(content)), Text(IDEAL), _workload_table(content["workload"])]),
        Section("Memory and start", _server_blocks(content)),
        model_section(content["models"], key),
        setting_section(content),
        raw_section(result),
    ]
    return Chapter(f"Online: {result.name}", sections)


def _throughput_blocks(scenarios: Sequence[Scenario], key: str) -> list[Block]:
    rows, gains = [], []
    for scenario in scenarios:
        speedup = (scenario.get("speedups") or {}).get("requests_per_s")
        bracket = ideal_bracket(scenario)
        rows.append(
            (
                scenario["name"],
                *(_of(scenario, side, "requests_per_s") for side in SIDES),
                speedup_text(speedup) if speedup else "-",
                f"{bracket[0]:.2f} to {bracket[1]:.2f}x" if bracket else "-",
                *(_of(scenario, side, "output_tokens_per_s") for side in SIDES),
                *(_of(scenario, side, "goodput_requests_per_s") for side in SIDES),
                *(_of(scenario, side, "mean_batch") for side in SIDES),
            )
        )
        if speedup and bracket and scenario.get("kind") != "rate":
            runs = [_runs(scenario, side, "requests_per_s") for side in SIDES]
            low, high = speedup.get("speedup_low"), speedup.get("speedup_high")
            gains.append(Gain(scenario["name"], speedup["speedup"], low, high, ratios(runs[1], runs[0]), bracket))
    paired = [f"{side}, {unit}" for unit in ("tokens/s", "goodput/s", "batch") for side in SIDES]
    header = ["scenario", "dense, requests/s", "pruned, requests/s", "gain (95 % interval)", "ideal", *paired]
    blocks: list[Block] = [Table(header, rows)]
    if gains:
        caption = (
            "Gain in requests per second; the bar is the bracket of the ideal, pale dots are single pairs of runs."
        )
        blocks.append(Figure(speedup_figure(gains, f"{key}-gain"), caption))
    if any(scenario.get("kind") == "rate" for scenario in scenarios):
        blocks.append(
            Text("At a fixed rate of requests below saturation both models serve all of them: look at latency.")
        )
    return blocks


def ideal_bracket(scenario: Scenario) -> tuple[float, float] | None:
    """From where to where the ideal lies; None where the result does not say."""
    ideal = scenario.get("ideal")
    return (min(ideal["prefill"], ideal["decode"]), max(ideal["prefill"], ideal["decode"])) if ideal else None


def _runs(scenario: Scenario, side: str, figure: str) -> list[float]:
    """A figure of all runs; without those that do not have it."""
    return [run[figure] for run in scenario[side]["runs"] if run.get(figure) is not None]


def _of(scenario: Scenario, side: str, figure: str) -> str:
    value = scenario[side]["median"].get(figure)
    return "-" if value is None else significant(value)


def _latency_blocks(scenarios: Sequence[Scenario], key: str) -> list[Block]:
    rows = []
    for scenario in scenarios:
        for latency, name in LATENCIES.items():
            cells = [" / ".join(_of(scenario, side, f"{latency}_{p}_ms") for p in PERCENTILES) for side in SIDES]
            speedup = (scenario.get("speedups") or {}).get(f"{latency}_p50_ms")
            rows.append((scenario["name"], name, *cells, speedup_text(speedup) if speedup else "-"))
    header = ("scenario", "latency", "dense p50 / p90 / p99, ms", "pruned p50 / p90 / p99, ms", "gain at p50")
    blocks: list[Block] = []
    for latency in ("ttft", "tpot", "e2e"):
        blocks += _latency_curves(scenarios, latency, key)
    return [*blocks, Table(header, rows)]


def _latency_curves(scenarios: Sequence[Scenario], latency: str, key: str) -> list[Block]:
    """A figure for each kind of load that has several levels; the saturated run ends the curve of rates."""
    blocks: list[Block] = []
    for kind, words in (("rate", "rising rates of requests"), ("concurrency", "more requests at once")):
        chosen = [scenario for scenario in scenarios if scenario["kind"] == kind]
        if len(chosen) < 2:
            continue
        figure = f"{latency}_p50_ms"
        curves, dots = {}, {}
        for side in SIDES:
            curves[side] = [(s[side]["median"]["requests_per_s"], s[side]["median"][figure]) for s in chosen]
            dots[side] = [(run["requests_per_s"], run[figure]) for s in chosen for run in s[side]["runs"]]
        if any(None in point for points in (*curves.values(), *dots.values()) for point in points):
            continue
        svg = latency_figure(curves, dots, f"Median {LATENCIES[latency]}", f"{key}-{latency}-{kind}")
        blocks.append(Figure(svg, f"Points from left to right: {words}. Pale dots are single runs."))
    return blocks


def _method(content: Mapping[str, Any]) -> str:
    settings = content["settings"]
    turns = settings.get("turns", "in turns")
    return (
        "vllm serve ran with the dense and with the pruned model, each with the same total memory, so that "
        f"what pruning saves became KV cache. vLLM's own benchmark client sent both the same requests in turns "
        f"({turns}), {settings.get('repeats', 'several')} times each scenario. A gain is the median of the ratios of "
        "neighbouring runs; above 1 is the pruned model's, also where less is better."
    )


def _workload_table(workload: Mapping[str, Any]) -> Table:
    rows = []
    for name, value in workload.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} {shown(number)}" for key, number in value.items())
        rows.append((name, shown(value)))
    return Table(("workload", ""), rows)


def _server_blocks(content: Mapping[str, Any]) -> list[Block]:
    servers = content["servers"]
    memory = {"weights_bytes": "weights", "kv_cache_bytes": "KV cache", "peak_memory_bytes": "peak memory"}
    rows = [
        (name, *(_gib(servers[side].get(key)) for side in SIDES), _ratio(servers, key)) for key, name in memory.items()
    ]
    tokens = [servers[side].get("kv_cache_tokens") for side in SIDES]
    rows.append(
        ("KV cache, tokens", *(shown(count) if count else "-" for count in tokens), _ratio(servers, "kv_cache_tokens"))
    )
    blocks: list[Block] = [Table(("server", "dense", "pruned", "pruned of dense"), rows)]
    starts = [
        (
            f"{side}, {'empty' if start.get('cold') else 'warm'} compile cache",
            *(_seconds(start.get(key)) for key in STARTS),
        )
        for side in SIDES
        for start in servers[side].get("starts") or []
    ]
    if starts:
        blocks += [Table(("start, seconds", *STARTS.values()), starts), Text(START_NOTE)]
    return [*blocks, *(Code(servers[side]["command"]) for side in SIDES if servers[side].get("command"))]


STARTS = {
    "weights_load_s": "weights",
    "compile_s": "compile",
    "init_engine_s": "KV cache, compile, warm-up",
    "ready_s": "ready",
    "first_token_s": "first token",
}


def _gib(size: float | None) -> str:
    return "-" if size is None else f"{size / GIB:,.2f} GiB"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"


def _ratio(servers: Mapping[str, Any], key: str) -> str:
    dense, pruned = (servers[side].get(key) for side in SIDES)
    return f"{pruned / dense:.2f}" if dense and pruned else "-"


def online_measures(result: Result) -> list[Measure]:
    """Throughput and latencies of both models in each scenario, and the gains."""
    figures = {"requests_per_s": ("requests/s", True)}
    figures |= {f"{latency}_{p}_ms": ("ms", False) for latency in LATENCIES for p in ("p50", "p99")}
    found = []
    for scenario in result.content["scenarios"]:
        for figure, (unit, more_is_better) in figures.items():
            if speedup := (scenario.get("speedups") or {}).get(figure):
                low, high = speedup.get("speedup_low"), speedup.get("speedup_high")
                found.append(Measure(f"{scenario['name']}, gain in {figure}", speedup["speedup"], "x", low, high, True))
            for side in SIDES:
                if values := _runs(scenario, side, figure):
                    low, high = median_interval(values) or (None, None)
                    name = f"{scenario['name']}, {side} {figure}"
                    found.append(Measure(name, median(values), unit, low, high, more_is_better))
    return found
