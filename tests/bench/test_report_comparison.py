"""bench.report sets results side by side: what changed, what voids a comparison, whether online and offline agree."""

from pathlib import Path

import pytest
from helpers import speed_results
from helpers.pages import Page, page_of, write

from bench.report.__main__ import main as report
from bench.report.offline import offline_measures
from bench.report.results import Result


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


def test_a_server_that_answers_later_is_worse_and_one_that_answers_more_is_better(tmp_path, capsys):
    after = speed_results.online()
    for scenario in after["scenarios"]:
        for run in scenario["pruned"]["runs"]:
            run.update({figure: 2 * run[figure] for figure in ("requests_per_s", "ttft_p50_ms")})
    verdicts = rows_of(compared(tmp_path, speed_results.online(), after, capsys)[0])
    assert verdicts["saturation, pruned ttft_p50_ms"] == "WORSE"
    assert verdicts["saturation, pruned requests_per_s"] == "better"
    assert verdicts["saturation, dense ttft_p50_ms"] == "within the intervals"


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


def test_other_kinds_are_not_compared(tmp_path, capsys):
    paths = map(str, write(tmp_path, a=speed_results.offline(), b=speed_results.online()))
    assert report(["--compare", *paths, "--output-dir", str(tmp_path / "report")]) == 2
    assert "compare equal kinds" in capsys.readouterr().err


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
