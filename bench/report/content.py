"""What a report consists of, whatever it is written as. Pure Python.

A report has chapters, one for each result; a chapter has sections; a section has blocks. All strings are plain text:
whoever writes them escapes them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field


def significant(value: float, digits: int = 3) -> str:
    """So many digits at least, and never an exponent: 1,234 and 0.0123, where Python's "g" makes 1e+03 of 999.7."""
    if not value or not math.isfinite(value):
        return f"{value:g}"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{places}f}"
    return text.rstrip("0").rstrip(".") if places else text


@dataclass(frozen=True)
class Text:
    """One paragraph."""

    text: str


@dataclass(frozen=True)
class Warnings:
    """What a reader must know before believing the figures."""

    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Rows of cells; the first cell of a row names it. Raises ValueError where a row has another number of cells."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __post_init__(self) -> None:
        if odd := [row for row in self.rows if len(row) != len(self.header)]:
            raise ValueError(f"{len(self.header)} columns, but rows {odd}")


@dataclass(frozen=True)
class Figure:
    """A drawing: `svg` is markup of bench.report.drawing, `caption` says what it shows."""

    svg: str
    caption: str


@dataclass(frozen=True)
class Code:
    """Commands, as a user would type them."""

    text: str


@dataclass(frozen=True)
class Fold:
    """Blocks that most readers skip, behind a line that opens them."""

    summary: str
    blocks: Sequence["Block"]


@dataclass(frozen=True)
class Raw:
    """A file as it was read, to look at and to save again under its name."""

    name: str
    text: str


Block = Text | Warnings | Table | Figure | Code | Fold | Raw


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Chapter:
    title: str
    sections: Sequence[Section]


@dataclass(frozen=True)
class Report:
    title: str
    chapters: Sequence[Chapter] = field(default_factory=tuple)
