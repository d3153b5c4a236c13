"""bench.report: the page stands alone, is harmless, and says what the results say; comparisons say what voids them."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers import speed_results

from bench.report.__main__ import main as report
from bench.report.content import significant
from bench.report.markdown import escaped
from bench.report.offline import offline_measures
from bench.report.reports import report_beside, write_report
from bench.report.results import Result

RESULTS = Path(__file__).parents[2] / "bench" / "results"
VOID_TAGS = {"meta", "link", "br", "img", "input", "hr"}
HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>|`*_$\\frac"


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


def compared(directory: Path, before: dict, after: dict, capsys) -> tuple[str, str]:
    """The Markdown of a comparison, and what stderr says."""
    paths = map(str, write(directory, before=before, after=after))
    assert report(["--compare", *paths, "--output-dir", str(directory / "report")]) == 0
    assert_stands_alone_without_figures(Page((directory / "report" / "report.html").read_text(encoding="utf-8")))
    return (directory / "report" / "report.md").read_text(encoding="utf-8").replace("\\", ""), capsys.readouterr().err


def assert_stands_alone_without_figures(page: Page) -> None:
    assert not {"script", "link", "img", "a"} & {tag for tag, _ in page.tags}


def rows_of(markdown: str) -> dict[str, str]:
    """Verdicts by figure."""
    cells = [line.strip("| ").split(" | ") for line in markdown.splitlines() if line.startswith("| ")]
    return {row[0]: row[-1] for row in cells if len(row) == 5}


def test_comparing_a_result_with_itself_changes_nothing(tmp_path, capsys):
    for content in (speed_results.offline(), speed_results.online()):
        markdown, error = compared(tmp_path, content, content, capsys)
        assert not error and "Warning" not in markdown and "\n0 of " in markdown
        assert set(rows_of(markdown).values()) == {"verdict", "---", "within the intervals"}


def test_a_change_beyond_the_intervals_is_told_from_noise(tmp_path, capsys):
    markdown, error = compared(tmp_path, speed_results.offline(1.6), speed_results.offline(1.5), capsys)
    verdicts = rows_of(markdown)
    assert verdicts["decode:8:32:64, speedup"] == verdicts["decode:8:32:64, pruned"] == "WORSE"
    assert verdicts["decode:8:32:64, dense"] == "within the intervals" and not error
    assert (
        rows_of(compared(tmp_path, speed_results.offline(1.5), speed_results.offline(1.6), capsys)[0])[
            "prefill:1:512, pruned"
        ]
        == "better"
    ), "less time is better"
    noisy = compared(tmp_path, speed_results.offline(1.6, noise=0.1), speed_results.offline(1.5, noise=0.1), capsys)[0]
    assert rows_of(noisy)["decode:8:32:64, speedup"] == "within the intervals"


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda b: b["hardware"].update(cpu="Other"), "hardware.cpu is Imaginary 9000 in A, Other in B"),
        (lambda b: b["hardware"]["environment"].update(X="1"), None),  # A does not say: no alarm, but it is written
        (lambda b: b["versions"].update(torch="3.0"), "versions.torch is 2.13.0 in A, 3.0 in B"),
        (lambda b: b["settings"].update(compile=False), "settings.compile is yes in A, no in B"),
        (lambda b: b["models"]["pruned"]["layers"][0].update(intermediate_size=1), "models.pruned.layers have other"),
        (
            lambda b: b["machine"].update(bandwidth_gb_per_s=20.0),
            "the machine itself was measured at 25.5 in A, 20 in B",
        ),
        (lambda b: b["versions"].update({"pruned-vllm": "0.3"}), None),  # that is what is being worked on
        (lambda b: b["settings"].update(repeats=9), None),
        (lambda b: b["models"]["dense"].update(path="elsewhere"), None),
    ],
)
def test_what_voids_a_comparison_is_said_loudly(change, words, tmp_path, capsys):
    after = speed_results.offline()
    change(after)
    markdown, error = compared(tmp_path, speed_results.offline(), after, capsys)
    if words is None:
        assert not error and "Warning" not in markdown and "Also different: " in markdown
    else:
        assert words in error and f"> **Warning:** {words}" in markdown


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


def test_a_server_that_answers_later_is_worse_and_one_that_answers_more_is_better(tmp_path, capsys):
    after = speed_results.online()
    for scenario in after["scenarios"]:
        for run in scenario["pruned"]["runs"]:
            run.update({figure: 2 * run[figure] for figure in ("requests_per_s", "ttft_p50_ms")})
    verdicts = rows_of(compared(tmp_path, speed_results.online(), after, capsys)[0])
    assert verdicts["saturation, pruned ttft_p50_ms"] == "WORSE"
    assert verdicts["saturation, pruned requests_per_s"] == "better"
    assert verdicts["saturation, dense ttft_p50_ms"] == "within the intervals"


def test_memory_is_that_of_pruned_over_dense(tmp_path):
    content = speed_results.online()
    content["servers"]["pruned"] = content["servers"]["dense"] | {"kv_cache_tokens": 3 * 54_321, "weights_bytes": 2**29}
    _, markdown = page_of(tmp_path, result=content)
    rows = {row.split(" | ")[0].strip("| "): row for row in markdown.splitlines() if row.startswith("| ")}
    assert rows["KV cache, tokens"] == "| KV cache, tokens | 54,321 | 162,963 | 3.00 |"
    assert rows["weights"] == "| weights | 1.00 GiB | 0.50 GiB | 0.50 |"


def test_other_requests_void_a_comparison_of_servers(tmp_path, capsys):
    after = speed_results.online()
    after["workload"].update(name="long-context")
    markdown, error = compared(tmp_path, speed_results.online(), after, capsys)
    words = "workload.name is chat in A, long-context in B"
    assert words in error and f"> **Warning:** {words}" in markdown


def test_a_comparison_says_where_intervals_are_no_95_percent_intervals(tmp_path, capsys):
    few, enough = speed_results.online(), speed_results.offline()
    assert "hold the median in 75% of cases only" in compared(tmp_path, few, few, capsys)[0]
    assert "of cases only" not in compared(tmp_path, enough, enough, capsys)[0]
    again = speed_results.offline()
    again["settings"].update(repeats=3, rounds=2)
    for case in again["cases"]:
        for side in ("dense", "pruned", "plugin_dense"):
            del case[side]["samples_s"][6:]
    assert "hold the median in 50% of cases only" in compared(tmp_path, enough, again, capsys)[0]


def test_intervals_of_times_are_those_of_rounds():
    content = speed_results.offline()
    for case in content["cases"]:
        for side in ("dense", "pruned", "plugin_dense"):
            case[side]["samples_s"] = [1.0, 1.01, 1.02] * 2 + [2.0, 2.01, 2.02] * 2
    found = {}
    for rounds in (1, 2):
        content["settings"]["rounds"] = rounds
        measures = {measure.name: measure for measure in offline_measures(Result("x", "offline", content))}
        found[rounds] = measures["decode:8:32:64, pruned"]
    assert (found[2].low, found[2].high) == (1000, 2020), "one of two rounds alone is a draw that is likely"
    assert found[2].low < found[1].low and found[1].high < found[2].high


def test_a_limit_is_named_for_each_model_where_they_differ(tmp_path):
    content = speed_results.offline()
    content["cases"][0]["pruned"].update(of_bandwidth=0.41, of_gemm_rate=0.43)
    assert "83% of memory / 43% of arithmetic" in page_of(tmp_path, result=content)[0].text
    content["cases"][0]["pruned"].update(of_bandwidth=0.51)
    assert "83% / 51% of memory" in page_of(tmp_path, result=content)[0].text


def test_other_kinds_are_not_compared(tmp_path, capsys):
    paths = map(str, write(tmp_path, a=speed_results.offline(), b=speed_results.online()))
    assert report(["--compare", *paths, "--output-dir", str(tmp_path / "report")]) == 2
    assert "compare equal kinds" in capsys.readouterr().err


def test_a_benchmark_reports_what_others_left_beside_it(tmp_path):
    paths = write(tmp_path, online_speedup=speed_results.online(), e2e_speedup=speed_results.offline())
    markdown, html = report_beside(paths[1])
    assert markdown.parent == html.parent == tmp_path
    chapters = re.findall(r"^## (\w+)", markdown.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert chapters[:2] == ["Offline", "Online"], "its own first"
    paths[0].write_text("{ half a fi")
    markdown, _ = report_beside(paths[1])
    assert "## Offline" in markdown.read_text(encoding="utf-8") and "Online" not in markdown.read_text(encoding="utf-8")


def agreement(directory: Path, offline: float, online: float, saturation: float) -> list[str]:
    """Verdicts where decode of batch 8 gained `offline`, time per token of 8 requests at once `online`."""
    content, traffic = speed_results.offline(offline), speed_results.online()
    for scenario in traffic["scenarios"]:
        if scenario["kind"] == "concurrency":
            scenario.update(value=8.0, name="concurrency:8")
            scenario["speedups"]["tpot_p50_ms"] = dict.fromkeys(("speedup", "speedup_low", "speedup_high"), online)
        scenario["speedups"]["requests_per_s"] = dict.fromkeys(("speedup", "speedup_low", "speedup_high"), saturation)
    _, markdown = page_of(directory, offline=content, online=traffic)
    table = markdown.partition("Do online and offline agree?")[2]
    return [row.strip("| ").split(" | ")[-1] for row in table.splitlines() if "decode:8" in row]


def test_online_and_offline_are_set_side_by_side(tmp_path):
    assert agreement(tmp_path, 1.6, 1.6, 1.6) == ["agree", "agree"]
    assert agreement(tmp_path, 1.6, 1.7, 1.7) == ["more, as larger batches allow", "ONLINE GAINS MORE"]
    assert agreement(tmp_path, 1.6, 1.5, 1.5) == ["ONLINE GAINS LESS", "ONLINE GAINS LESS"]
    other = speed_results.online()
    other["models"]["dense"]["parameters"] += 1
    _, markdown = page_of(tmp_path, offline=speed_results.offline(), online=other)
    assert "agree?" not in markdown, "other models"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda offline, online: online["hardware"].update(cpu="Other"), "hardware.cpu is Imaginary 9000 in A"),
        (lambda offline, online: online["versions"].update(vllm="0.33.0"), "versions.vllm is 0.32.0 in A"),
        (lambda offline, online: online["settings"].update(dtype="float32"), "settings.dtype is bfloat16 in A"),
        (lambda offline, online: offline["settings"].update(compile=False), "settings.compile is no in A, yes in B"),
        (lambda offline, online: online["settings"]["serve_arguments"].append("--enforce-eager"), "yes in A, no in B"),
        (lambda offline, online: None, None),
    ],
)
def test_what_was_not_measured_alike_does_not_silently_agree(change, words, tmp_path):
    offline, online = speed_results.offline(), speed_results.online()
    change(offline, online)
    _, markdown = page_of(tmp_path, offline=offline, online=online)
    chapter = markdown.partition("Do online and offline agree?")[2].replace("\\", "")
    assert chapter and ("not measured under the same conditions" in chapter) == (words is not None)
    assert words is None or words in chapter
