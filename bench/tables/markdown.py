"""How results are read, and how figures are written."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from pruned_vllm.common.files import read_json
from pruned_vllm.formats.ideal import Case

RESULTS = Path(__file__).parents[1] / "results"


def results(name: str) -> dict:
    """A file in bench/results, e.g. "cpu_sweep/sweep.json"."""
    return read_json(RESULTS / name)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    if odd := [row for row in rows if len(row) != len(header)]:
        raise ValueError(f"{len(header)} columns, but rows {odd}")
    return "\n".join("| " + " | ".join(line) + " |" for line in lines).replace("|  |", "| |").replace("|  |", "| |")


def with_quartiles(record: Mapping, median: str = "speedup", quartiles: str = "speedup") -> str:
    """1.65x (1.57 to 1.77), from the keys `median`, `quartiles`_q1 and `quartiles`_q3."""
    return f"{record[median]:.2f}x ({record[quartiles + '_q1']:.2f} to {record[quartiles + '_q3']:.2f})"


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def millions(parameters: int) -> str:
    return f"{parameters / 1e6:.0f}M"


def paragraph(text: str) -> str:
    return textwrap.fill(text, 120)


def bullet(text: str) -> str:
    return textwrap.fill(f"- {text}", 120, subsequent_indent="  ")


def from_to(values: Sequence[float], form: str) -> str:
    """The least and the largest, "8 to 9", or one of them where they are written alike."""
    ends = dict.fromkeys(format(value, form) for value in (min(values), max(values)))
    return " to ".join(ends)


def short_case_name(text: str) -> str:
    """decode, batch 1, of "decode:1:32:64"."""
    return case_name(vars(Case.parse(text)), tokens=False)


def case_name(case: Mapping, *, tokens: bool = True) -> str:
    """decode, batch 1, 32 + 64 tokens; prefill, 4 x 512 tokens"""
    if case["kind"] == "prefill":
        return f"prefill, {case['batch_size']} x {case['input_len']} tokens"
    name = f"decode, batch {case['batch_size']}"
    return f"{name}, {case['input_len']} + {case['output_len']} tokens" if tokens else name
