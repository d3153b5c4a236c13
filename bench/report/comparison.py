"""Two results of the same kind: what changed beyond the intervals, and what makes the comparison void. Pure Python."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.report.content import Block, Chapter, Section, Table, Text, Warnings, significant
from bench.report.models import flattened, shown
from bench.report.results import Result
from bench.speed.statistics import CONFIDENCE, interval_confidence

SETTING_KEYS = ("models", "settings", "workload", "versions", "hardware")
# What may differ between two results that are compared: where the files were, what is being worked on, and how long
# was measured, which the intervals account for.
HARMLESS = ("settings.repeats", "settings.rounds", "versions.pruned-vllm")
LARGEST_MACHINE_CHANGE = 0.1  # of the rates that the machine itself was measured to reach
MACHINE_RATES = {"bandwidth_gb_per_s": "memory bandwidth, GB/s", "gemm_tflop_per_s": "matrix products, TFLOP/s"}


@dataclass(frozen=True)
class Measure:
    """One figure of a result.

    Attributes:
        name: what was measured; the figure of the same name in another result is its counterpart.
        value, unit: the figure.
        low, high: its 95 % interval; None where there is none.
        more_is_better: whether a larger one is an improvement.
    """

    name: str
    value: float
    unit: str
    low: float | None
    high: float | None
    more_is_better: bool

    @property
    def text(self) -> str:
        text = f"{significant(self.value)} {self.unit}"
        if self.low is None or self.high is None:
            return text
        return f"{text} ({significant(self.low)} to {significant(self.high)})"


def verdict(before: Measure, after: Measure) -> str:
    """In words: whether the intervals are apart, and which way."""
    if before.low is None or before.high is None or after.low is None or after.high is None:
        return "no interval: cannot tell"
    if before.low <= after.high and after.low <= before.high:
        return "within the intervals"
    return "better" if (after.value > before.value) == before.more_is_better else "WORSE"


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What makes a comparison of these results void, and what else differs; a sentence each."""
    void: list[str] = []
    harmless: list[str] = []
    for section in SETTING_KEYS:
        first, second = (flattened(content.get(section) or {}, f"{section}.") for content in (before, after))
        for key in dict.fromkeys([*first, *second]):
            if first.get(key) == second.get(key):
                continue
            if key not in first or key not in second:
                harmless.append(f"{key} is said by {'A' if key in first else 'B'} only")
            else:
                quiet = key in HARMLESS or key.endswith(".path")
                (harmless if quiet else void).append(_difference(key, first[key], second[key]))
    return void + _machine_differences(before, after), harmless


def _difference(key: str, before: Any, after: Any) -> str:
    if key.endswith(".layers"):
        apart = sum(first != second for first, second in zip(before, after, strict=False))
        return f"{key} have other widths: {len(before)} layers in A, {len(after)} in B, {apart} of them differ"
    return f"{key} is {shown(before)} in A, {shown(after)} in B"


def _machine_differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    found = []
    for key, name in MACHINE_RATES.items():
        first, second = ((content.get("machine") or {}).get(key) for content in (before, after))
        if first and second and abs(second / first - 1) > LARGEST_MACHINE_CHANGE:
            rates = f"{significant(first)} in A, {significant(second)} in B"
            found.append(f"the machine itself was measured at {rates} ({name})")
    return found


def comparison_chapter(
    first: Result, second: Result, before: Sequence[Measure], after: Sequence[Measure]
) -> tuple[Chapter, list[str]]:
    """The chapter, and what makes the comparison void."""
    void, harmless = differences(first.content, second.content)
    names = Table(("", "result", "command"), [_name_row("A", first), _name_row("B", second)])
    blocks: list[Block] = [names]
    if void:
        blocks.append(Warnings(["A and B did not measure the same thing under the same conditions.", *void]))
    if harmless:
        blocks.append(Text("Also different: " + "; ".join(harmless) + "."))
    if not void:
        blocks.append(
            Text("Models, settings, workload, versions and hardware are the same as far as both results say.")
        )
    changes = Section("What changed", [*_doubts(first, second), *_change_blocks(before, after)])
    title = f"{second.name} against {first.name}"
    return Chapter(title, [Section("Is this a fair comparison?", blocks), changes]), void


def _name_row(letter: str, result: Result) -> tuple[str, str, str]:
    return letter, result.name, str(result.content.get("command", "not said"))


def _doubts(*results: Result) -> list[Block]:
    """A sentence where intervals are no 95 % intervals, so that equal results have some that are apart."""
    counts = [result.content["settings"] for result in results]
    confidences = [interval_confidence(found["repeats"], found.get("rounds", 1)) for found in counts]
    least = min((confidence for confidence in confidences if confidence), default=CONFIDENCE)
    if least >= CONFIDENCE:
        return []
    return [
        Text(
            f"Intervals hold the median in {least:.0%} of cases only, as there are too few repeats for 95 %: expect "
            "some figures that are called changed and are not."
        )
    ]


def _change_blocks(before: Sequence[Measure], after: Sequence[Measure]) -> list[Block]:
    later = {measure.name: measure for measure in after}
    pairs = [(measure, later[measure.name]) for measure in before if measure.name in later]
    names = [measure.name for measure in before], list(later)
    lonely = [name for name in [*names[0], *names[1]] if (name in names[0]) != (name in names[1])]
    rows = [
        (old.name, old.text, new.text, f"{new.value / old.value - 1:+.1%}" if old.value else "", verdict(old, new))
        for old, new in pairs
    ]
    changed = [row for row in rows if row[-1] in ("better", "WORSE")]
    blocks: list[Block] = [
        Text(
            f"{len(changed)} of {len(rows)} figures changed beyond their intervals. A figure counts as changed where "
            "the intervals of A and B have nothing in common."
        ),
        Table(("figure", "A", "B", "change", "verdict"), [*changed, *(row for row in rows if row not in changed)]),
    ]
    if lonely:
        blocks.append(Text("Measured in one of the two only: " + ", ".join(lonely) + "."))
    return blocks
