"""Writes a report as report.md and as report.html, which holds everything it shows."""

import base64
from pathlib import Path

from bench.report.content import Report
from bench.report.markdown import to_markdown

TEMPLATE = Path(__file__).with_name("page.html.jinja")


def write(report: Report, directory: Path) -> tuple[Path, Path]:
    """Creates the directory; returns the paths of report.md and report.html."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = directory / "report.md", directory / "report.html"
    for path, text in zip(paths, (to_markdown(report), to_html(report)), strict=True):
        temporary = path.with_name(f"{path.name}.partial")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    return paths


def to_html(report: Report) -> str:
    """A page that needs no other file. Everything but the drawings is escaped."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.tests["kind"] = lambda block, name: type(block).__name__ == name
    environment.filters["data_uri"] = data_uri
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(report=report)


def data_uri(text: str) -> str:
    return "data:application/json;base64," + base64.b64encode(text.encode()).decode()
