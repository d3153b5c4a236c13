"""README.md and bench/README.md quote what the JSON files in bench/results say, and nothing else."""

import json
import re

import pytest

from bench.report.sweep import plotted_figures
from bench.tables import blocks, markdown, sweep
from bench.tables.blocks import BLOCKS, DOCUMENTS, stale_blocks, with_blocks
from pruned_vllm.common.errors import InputError

TEXTS = {path.relative_to(blocks.ROOT).as_posix(): path.read_text(encoding="utf-8") for path in DOCUMENTS}
# A figure with a unit of what is measured here.
FIGURE = re.compile(
    r"\d[\d.,]*(?:x\b|\s?%|\s?±|\s?(?:tok/s|GB/s|TFLOP/s|ms|seconds?|minutes?|M|million)\b)|perplexity \d"
)
# Promises that tests keep, not measurements.
ALLOWED: dict[str, list[str]] = {"README.md": [], "bench/README.md": []}
FILES = sorted(path for path in markdown.RESULTS.rglob("*.json"))


@pytest.mark.parametrize("name", TEXTS)
def test_every_block_says_what_the_json_files_say(name):
    assert stale_blocks(TEXTS[name]) == [], "run `python -m bench.tables`"


@pytest.mark.parametrize("name", TEXTS)
def test_no_measured_figure_stands_outside_of_the_blocks(name):
    """Where a test would not notice when it grows old."""
    prose = re.sub(r"^    .*$|`[^`]*`", "", blocks.BLOCK.sub("", TEXTS[name]), flags=re.MULTILINE)
    assert FIGURE.findall(prose) == ALLOWED[name], "move it into a block of bench/tables"


def test_every_block_is_used():
    used = [match["name"] for text in TEXTS.values() for match in blocks.BLOCK.finditer(text)]
    assert sorted(used) == sorted(BLOCKS)


@pytest.mark.parametrize("name", TEXTS)
def test_a_figure_that_is_changed_in_the_text_is_found(name):
    for match in blocks.BLOCK.finditer(TEXTS[name]):
        for figure in re.finditer(r"\d+\.\d+", match["body"]):
            edited = f"{figure[0]}1"
            body = match["body"][: figure.start()] + edited + match["body"][figure.end() :]
            assert stale_blocks(match[0].replace(match["body"], body)) == [match["name"]], figure[0]


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.relative_to(markdown.RESULTS).as_posix())
def test_a_figure_that_is_changed_in_the_results_is_found(file, monkeypatch):
    """Every result file that is committed has a figure in the documents."""

    def shifted(value):
        if isinstance(value, dict):
            return {key: shifted(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [shifted(inner) for inner in value]
        return value * 1.1 if isinstance(value, float) else value

    changed = shifted(json.loads(file.read_text()))
    results = markdown.results

    def changed_results(name):
        return changed if markdown.RESULTS / name == file else results(name)

    for module in (
        blocks.breakdown,
        blocks.compare,
        blocks.conversion,
        blocks.experts,
        blocks.layouts,
        blocks.learning,
        blocks.methods,
        blocks.models,
        blocks.online,
        blocks.quantized,
        blocks.real,
        blocks.sweep,
    ):
        monkeypatch.setattr(module, "results", changed_results)
    found = set()
    for text in TEXTS.values():
        for match in blocks.BLOCK.finditer(text):
            try:
                found |= set(stale_blocks(match[0]))
            except ValueError:  # a sentence that does not hold any more
                found.add(match["name"])
    assert found


def test_the_picture_shows_the_results():
    from PIL import Image

    path = markdown.RESULTS / sweep.SWEEP
    with Image.open(path.with_suffix(".png")) as image:
        assert image.text["Description"] == plotted_figures(json.loads(path.read_text())["cells"]), "draw it anew"


def test_a_block_that_nobody_makes_is_refused():
    with pytest.raises(InputError, match="no block is called 'speed'; there are headline, "):
        with_blocks("<!-- measured: speed -->\n<!-- end -->\n")


def test_readme_stays_short():
    assert TEXTS["README.md"].count("\n") <= 150
