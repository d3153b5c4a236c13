"""A report as Markdown: text and tables. Drawings and raw results are in the page beside it. Pure Python."""

import re
from collections.abc import Sequence

from bench.report.content import Block, Code, Figure, Fold, Raw, Report, Table, Text, Warnings


def to_markdown(report: Report) -> str:
    lines = [f"# {escaped(report.title)}"]
    for chapter in report.chapters:
        lines.append(f"## {escaped(chapter.title)}")
        for section in chapter.sections:
            lines += [f"### {escaped(section.title)}", *_paragraphs(section.blocks)]
    return "\n\n".join(lines) + "\n"


def _paragraphs(blocks: Sequence[Block]) -> list[str]:
    """Markup of each block that has any."""
    found = []
    for block in blocks:
        match block:
            case Text(text):
                found.append(escaped(text))
            case Warnings(items):
                found.append("\n".join(f"> **Warning:** {escaped(item)}  " for item in items))
            case Table(header, rows):
                found.append(markdown_table(header, rows))
            case Figure(_, caption):
                found.append(f"*Figure in report.html: {escaped(caption)}*")
            case Code(text):
                found.append("\n".join(f"    {line}" for line in text.splitlines()))
            case Fold(summary, inside):
                found += [f"{escaped(summary)}:", *_paragraphs(inside)]
            case Raw(name, _):
                found.append(f"{escaped(name)}; report.html holds a copy.")
    return found


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *([escaped(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def escaped(text: str) -> str:
    """`text` as Markdown shows it: no tag, no cell border, no emphasis by accident, on one line."""
    text = re.sub(r"([\\`*_\[\]|~])", r"\\\1", " ".join(text.split()))
    return text.replace("&", "&amp;").replace("<", "&lt;")
