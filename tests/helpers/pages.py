"""Reports of results, as a browser would find them."""

import json
from html.parser import HTMLParser
from pathlib import Path

from bench.report.reports import write_report

VOID_TAGS = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """What a browser would find in a page: tags with attributes, text, ids. Refuses tags that are not closed."""

    def __init__(self, markup: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(markup)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text += data

    def attributes(self, name: str) -> list[str]:
        return [attributes[name] for _, attributes in self.tags if name in attributes]


def write(directory: Path, **results: dict) -> list[Path]:
    paths = []
    for name, content in results.items():
        paths.append(directory / f"{name}.json")
        paths[-1].write_text(json.dumps(content))
    return paths


def page_of(directory: Path, **results: dict) -> tuple[Page, str]:
    """The page of these results, and the Markdown."""
    markdown, html = write_report(write(directory, **results), directory / "report")
    return Page(html.read_text(encoding="utf-8")), markdown.read_text(encoding="utf-8")
