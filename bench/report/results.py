"""Reads result files and says of which kind they are. Older results lack keys, and are read all the same."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bench.speed.statistics import interval_text, speedup_statistics
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import read_json


class Kind(NamedTuple):
    """How a kind of result is known.

    Attributes:
        key: the list that this kind has.
        member: a key of its members that no other kind's have.
        writer: the benchmark that writes it, as file_name.
    """

    key: str
    member: str
    writer: str
    file_name: str


KINDS = {
    "offline": Kind("cases", "of_ideal", "bench/e2e_speedup.py", "e2e_speedup.json"),
    "online": Kind("scenarios", "speedups", "bench/online_speedup.py", "online_speedup.json"),
    "sweep": Kind("cells", "sparsity", "python -m bench.sweep", "sweep.json"),
}


@dataclass(frozen=True)
class Result:
    """One result file.

    Attributes:
        name: what the reader knows it by, its path.
        kind: a key of KINDS.
        content: the JSON object.
    """

    name: str
    kind: str
    content: Mapping[str, Any]


def read_results(paths: Sequence[Path]) -> list[Result]:
    """All files. Raises InputError with every one that cannot be reported."""
    found, problems = [], []
    for path in paths:
        try:
            content = read_json(path)
            found.append(Result(str(path), kind_of(content), content))
        except (InputError, OSError) as error:
            problems.append(f"{path}: {error}" if str(path) not in str(error) else str(error))
    if problems:
        raise InputError("These results cannot be reported:", problems)
    return found


def kind_of(content: Mapping[str, Any]) -> str:
    """A key of KINDS. Raises InputError."""
    for name, kind in KINDS.items():
        members = content.get(kind.key)
        if isinstance(members, list) and members and kind.member in members[0]:
            return name
    known = ", ".join(f"{kind.writer} ({kind.key})" for kind in KINDS.values())
    raise InputError(
        f"this is no result of a benchmark that has reports: there is no list of what was measured, as in {known}"
    )


def with_interval(case: Mapping[str, Any]) -> dict[str, Any]:
    """A case of bench/e2e_speedup.py with its 95 % interval, which older results leave to us."""
    if "speedup_low" in case:
        return dict(case)
    return {**case, **speedup_statistics(case["dense"]["samples_s"], case["pruned"]["samples_s"])}


def speedup_text(case: Mapping[str, Any]) -> str:
    """1.65x (1.57 to 1.77), or 1.65x (1.57 to 1.77, 75 %) where that is no 95 % interval."""
    interval = interval_text(case)
    return f"{case['speedup']:.2f}x" + (f" ({interval})" if interval else "")
