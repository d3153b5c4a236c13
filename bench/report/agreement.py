"""Whether an offline and an online result of the same models agree where they measure the same thing. Pure Python.

With N requests at once a server decodes batches of about N: its gain in time per output token should be the offline
speedup of decode at batch N. At saturation the gain in requests per second should be at least that of the batch which
the server reached; memory that pruning frees makes room for larger batches, which adds to it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from bench.report.comparison import differences
from bench.report.content import Block, Chapter, Section, Table, Text, Warnings
from bench.report.results import Result, speedup_text, with_interval

SAME_BATCH = (
    "With N requests at once a server decodes batches of about N, with prefills in between: its gain in time per "
    "output token is set beside the offline speedup of decode at batch N."
)
SATURATED = (
    "At saturation the gain in requests per second should be at least the offline speedup of the batch that the server "
    "reached; offline cases are those with the nearest batch."
)


def agreement_chapters(results: Sequence[Result]) -> list[Chapter]:
    """A chapter if there are an offline and an online result of the same models, with cases that both measured."""
    by_kind = {result.kind: result for result in reversed(results)}
    if not {"offline", "online"} <= set(by_kind):
        return []
    offline, online = by_kind["offline"].content, by_kind["online"].content
    if _sizes(offline) != _sizes(online):
        return []
    decode = {case["batch_size"]: with_interval(case) for case in offline["cases"] if case["kind"] == "decode"}
    rows = [row for scenario in online["scenarios"] if (row := _row(scenario, decode))]
    if not rows:
        return []
    header = ("online", "gain (95 % interval)", "offline", "speedup (95 % interval)", "verdict")
    blocks: list[Block] = [Text(SAME_BATCH), Text(SATURATED), Table(header, rows)]
    if apart := _conditions(offline, online):
        blocks.insert(0, Warnings(["Offline (A) and online (B) were not measured under the same conditions.", *apart]))
    return [Chapter("Do online and offline agree?", [Section("Gains side by side", blocks)])]


def _sizes(content: Mapping[str, Any]) -> list[int]:
    return [content["models"][side]["parameters"] for side in ("dense", "pruned")]


def _conditions(offline: Mapping[str, Any], online: Mapping[str, Any]) -> list[str]:
    """What differs between the two besides what they measure: machine, versions, dtype, compilation; sentences."""

    def conditions(content: Mapping[str, Any], compiled: bool) -> dict:
        settings = {key: content["settings"].get(key) for key in ("dtype", "load_format")} | {"compile": compiled}
        return {key: content.get(key) for key in ("versions", "hardware")} | {"settings": settings}

    eager = "--enforce-eager" in (online["settings"].get("serve_arguments") or [])
    void, _ = differences(conditions(offline, bool(offline["settings"].get("compile"))), conditions(online, not eager))
    return void


def _row(scenario: Mapping[str, Any], decode: Mapping[int, Mapping[str, Any]]) -> tuple[str, ...] | None:
    """A scenario beside the decode case that it should be like; None where there is none."""
    if not decode:
        return None
    batch = scenario["dense"]["median"].get("mean_batch")
    if scenario["kind"] == "concurrency" and scenario["value"] in decode:
        gain, case = scenario["speedups"].get("tpot_p50_ms"), decode[int(scenario["value"])]
        name = f"{scenario['name']}, time per token"
    elif scenario["kind"] == "saturation" and batch:
        gain, case = scenario["speedups"].get("requests_per_s"), decode[min(decode, key=lambda size: abs(size - batch))]
        name = f"saturation (batch {batch:.1f}), requests/s"
    else:
        return None
    if not gain:
        return None
    return name, speedup_text(gain), case["name"], speedup_text(case), _verdict(gain, case, scenario["kind"])


def _verdict(gain: Mapping[str, Any], case: Mapping[str, Any], kind: str) -> str:
    ends = gain.get("speedup_low"), gain.get("speedup_high"), case["speedup_low"], case["speedup_high"]
    if None in ends:
        return "no interval: cannot tell"
    low, high, case_low, case_high = ends
    if low <= case_high and case_low <= high:
        return "agree"
    if low > case_high:
        return "more, as larger batches allow" if kind == "saturation" else "ONLINE GAINS MORE"
    return "ONLINE GAINS LESS"
