"""Whole reports: a chapter for each result, or one result against another."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from bench.report.agreement import agreement_chapters
from bench.report.comparison import Measure, comparison_chapter
from bench.report.content import Chapter, Report
from bench.report.offline import offline_chapter, offline_measures
from bench.report.online import online_chapter, online_measures
from bench.report.results import KINDS, Result, read_results
from bench.report.sweep import sweep_chapter, sweep_measures
from bench.report.write import write
from pruned_vllm.common.errors import InputError

CHAPTERS: dict[str, Callable[[Result, str], Chapter]] = {
    "offline": offline_chapter,
    "online": online_chapter,
    "sweep": sweep_chapter,
}
MEASURES: dict[str, Callable[[Result], list[Measure]]] = {
    "offline": offline_measures,
    "online": online_measures,
    "sweep": sweep_measures,
}


def results_report(results: Sequence[Result]) -> Report:
    """A chapter for each result, and one about whether they agree."""
    chapters = []
    for number, result in enumerate(results, 1):
        try:
            chapters.append(CHAPTERS[result.kind](result, f"r{number}"))
        except KeyError as error:
            raise InputError(f"{result.name} lacks the key {error}, which every {result.kind} result has") from None
    chapters += agreement_chapters(results)
    return Report("How much faster is the pruned model?", chapters)


def write_report(paths: Sequence[Path], directory: Path) -> tuple[Path, Path]:
    """Reads result files and writes DIRECTORY/report.md and report.html. Raises InputError before it writes."""
    return write(results_report(read_results(paths)), directory)


def report_beside(path: Path) -> tuple[Path, Path]:
    """Writes the report of a new result into its directory, with those that other benchmarks have left there.

    Of the others it takes what can be read: a file that is damaged must not spoil a measurement of hours.
    """
    results = read_results([path])
    for kind in KINDS.values():
        if kind.file_name != path.name:
            with suppress(InputError):
                results += read_results([path.with_name(kind.file_name)])
    return write(results_report(results), path.parent)


def comparison_report(first: Result, second: Result) -> tuple[Report, list[str]]:
    """`second` against `first`, and what makes the comparison void. Raises InputError where the kinds differ."""
    if first.kind != second.kind:
        raise InputError(
            f"{first.name} is an {first.kind} result, {second.name} an {second.kind} one; compare equal kinds"
        )
    chapter, void = comparison_chapter(first, second, *(MEASURES[first.kind](result) for result in (first, second)))
    return Report("What changed between two results", [chapter]), void
