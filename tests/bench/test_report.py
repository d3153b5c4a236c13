"""bench.report: the page stands alone, is harmless, and says what the results say."""

import base64
import json
import re
from pathlib import Path

import pytest
from helpers import speed_results
from helpers.pages import Page, page_of, write

from bench.report.__main__ import main as report
from bench.report.content import significant
from bench.report.markdown import escaped
from bench.report.reports import report_beside, write_report

RESULTS = Path(__file__).parents[2] / "bench" / "results"
HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>|`*_$\\frac"


def assert_stands_alone(page: Page) -> None:
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "img", "object", "embed", "base", "image"}
    links = page.attributes("href") + page.attributes("xlink:href")
    assert all(link.startswith(("#", "data:application/json;base64,")) for link in links)
    assert not page.attributes("src") and not [
        name for _, found in page.tags for name in found if name.startswith("on")
    ]
    ids = page.attributes("id")
    assert len(ids) == len(set(ids)) and {link[1:] for link in links if link.startswith("#")} <= set(ids)
    values = [value or "" for _, found in page.tags for value in found.values()]
    used = {name for value in values for name in re.findall(r"url\(#([^)]+)\)", value)}
    assert used and used <= set(ids), "clip paths exist under the names they are used by"
    assert not [value for value in values if re.search(r"url\((?!#)|https?:", value)]


def test_the_page_of_several_results_stands_alone(tmp_path):
    page, _ = page_of(
        tmp_path, first=speed_results.offline(), second=speed_results.offline(), online=speed_results.online()
    )
    assert_stands_alone(page)
    assert len([tag for tag, _ in page.tags if tag == "svg"]) > 12
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/e2e_speedup.json")), ids=lambda path: path.parent.name)
def test_committed_results_can_be_reported(path, tmp_path):
    """Also those from before results had intervals and widths."""
    markdown, html = write_report([path], tmp_path)
    page, case = Page(html.read_text(encoding="utf-8")), json.loads(path.read_text())["cases"][0]
    assert_stands_alone(page)
    assert f"{case['speedup']:.2f}x" in page.text and f"{case['ideal_speedup']:.2f}x" in markdown.read_text()


def test_strings_of_a_result_are_harmless(tmp_path):
    """They name files, cases and processors, and come from wherever the result comes from."""
    offline = speed_results.offline(pruned_path=HOSTILE)
    offline["command"] = offline["hardware"]["cpu"] = offline["cases"][0]["name"] = HOSTILE
    offline["cases"][0]["warnings"] = [HOSTILE]
    online = speed_results.online()
    online["servers"]["dense"]["command"] = online["scenarios"][0]["name"] = online["workload"]["name"] = HOSTILE
    page, markdown = page_of(tmp_path, offline=offline, online=online)
    assert_stands_alone(page)
    assert page.text.count(HOSTILE) > 6, "it is shown as it is"
    outside_of_code = re.sub(r"^ {4}.*$", "", markdown, flags=re.MULTILINE)
    assert "<script" not in outside_of_code and escaped(HOSTILE) in outside_of_code
    assert (
        len({line.count(" | ") for line in re.findall(r"^\| .*decode.*|^\| .*prefill.*", markdown, re.MULTILINE)}) < 9
    )


def test_raw_results_come_back_out_of_the_page(tmp_path):
    content = speed_results.offline()
    page, _ = page_of(tmp_path, result=content)
    ((name, link),) = [(a["download"], a["href"]) for tag, a in page.tags if tag == "a" and "download" in a]
    assert name == "result.json" and json.loads(base64.b64decode(link.partition(",")[2])) == content
    assert '"samples_s"' in page.text


def test_a_sceptic_finds_what_offline_measured(tmp_path):
    content = speed_results.offline(noise=0.05)
    page, markdown = page_of(tmp_path, result=content)
    case = content["cases"][0]
    for text in (page.text, markdown.replace("\\_", "_")):
        assert f"{case['speedup']:.2f}x ({case['speedup_low']:.2f} to {case['speedup_high']:.2f})" in text
        assert "1.75x" in text and f"{case['of_ideal']:.2f}" in text
        assert "compiled, as vLLM serves by default" in text and "eager" not in text
        assert "7 pairs of neighbouring runs" in text and "bytes that a step reads" in text
        assert all(warning in text for warning in case["warnings"]) and case["warnings"]
        assert "25.5 GB/s" in text and "0.19 TFLOP/s" in text and "83%" in text and "on 1 thread," in text
        assert "1.02x" in text, "what the plugin's class gains without pruning"
        assert "Imaginary 9000" in text and "2.13.0" in text and "python bench/x.py --pruned out" in text
        assert ", ".join(f"{seconds:.4g}" for seconds in case["pruned"]["samples_s"]) in text
        assert "65,432" in text and "2,097,152" in text


def test_widths_of_each_layer_are_shown(tmp_path):
    page, markdown = page_of(tmp_path, result=speed_results.offline())
    assert "| 0 | 3 of 4 | 2 of 2 | 37 of 100 |  |" in markdown
    assert "| 1 | 1 of 4 | 1 of 2 | 0 of 0 | 3: 0, 29, 64 of 64 |" in markdown
    labels = " ".join(page.attributes("aria-label"))
    assert "query heads of each layer, dense and pruned: 4 of 8" in labels
    assert "Widths of routed experts by layer: 87 of 192 channels" in labels


def test_a_sceptic_finds_what_online_measured(tmp_path):
    content = speed_results.online()
    page, _ = page_of(tmp_path, result=content)
    gain = content["scenarios"][0]["speedups"]["requests_per_s"]
    assert f"{gain['speedup']:.2f}x ({gain['speedup_low']:.2f} to {gain['speedup_high']:.2f}, 75 %)" in page.text
    assert "A shorter first start is no gain of pruning" in page.text
    assert (
        "1.70 to 1.90x" in page.text
        and "rate:1: noisy: rate:1" in page.text
        and "54,321" in page.text
        and "77.7" in page.text
        and "vllm serve base" in page.text
    )
    assert "909 / " not in page.text and "900 / 1,350 / 1,890" in page.text
    labels = [label for label in page.attributes("aria-label") if "over requests per second" in label]
    assert len(labels) == 3, "time to first token, per token and of the request, over the two rates"


def test_what_is_no_result_is_refused_and_nothing_written(tmp_path, capsys):
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.json").write_text('{"cases": [{"problems": []}]}')
    good = write(tmp_path, good=speed_results.offline())
    paths = [*good, tmp_path / "broken.json", tmp_path / "other.json", tmp_path / "absent.json"]
    assert report([*map(str, paths), "--output-dir", str(tmp_path / "report")]) == 2
    error = capsys.readouterr().err
    assert all(name in error for name in ("broken.json", "other.json", "absent.json", "bench/e2e_speedup.py (cases)"))
    assert "good.json" not in error and not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        *[(999.7, 3, "1,000"), (12345.6, 3, "12,346"), (0.01234, 3, "0.0123"), (25.5, 3, "25.5"), (20.0, 3, "20")],
        *[
            (20000.0, 4, "20,000"),
            (0.0, 3, "0"),
            (float("nan"), 3, "nan"),
            (-1.239, 3, "-1.24"),
            (2e-6, 3, "0.000002"),
        ],
    ],
)
def test_numbers_keep_their_digits_and_have_no_exponent(value, digits, text):
    assert significant(value, digits) == text


def test_memory_is_that_of_pruned_over_dense(tmp_path):
    content = speed_results.online()
    content["servers"]["pruned"] = content["servers"]["dense"] | {"kv_cache_tokens": 3 * 54_321, "weights_bytes": 2**29}
    _, markdown = page_of(tmp_path, result=content)
    rows = {row.split(" | ")[0].strip("| "): row for row in markdown.splitlines() if row.startswith("| ")}
    assert rows["KV cache, tokens"] == "| KV cache, tokens | 54,321 | 162,963 | 3.00 |"
    assert rows["weights"] == "| weights | 1.00 GiB | 0.50 GiB | 0.50 |"


def test_a_limit_is_named_for_each_model_where_they_differ(tmp_path):
    content = speed_results.offline()
    content["cases"][0]["pruned"].update(of_bandwidth=0.41, of_gemm_rate=0.43)
    assert "83% of memory / 43% of arithmetic" in page_of(tmp_path, result=content)[0].text
    content["cases"][0]["pruned"].update(of_bandwidth=0.51)
    assert "83% / 51% of memory" in page_of(tmp_path, result=content)[0].text


def test_a_benchmark_reports_what_others_left_beside_it(tmp_path):
    paths = write(tmp_path, online_speedup=speed_results.online(), e2e_speedup=speed_results.offline())
    markdown, html = report_beside(paths[1])
    assert markdown.parent == html.parent == tmp_path
    chapters = re.findall(r"^## (\w+)", markdown.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert chapters[:2] == ["Offline", "Online"], "its own first"
    paths[0].write_text("{ half a fi")
    markdown, _ = report_beside(paths[1])
    assert "## Offline" in markdown.read_text(encoding="utf-8") and "Online" not in markdown.read_text(encoding="utf-8")
