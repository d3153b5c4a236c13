"""Fuzzes what reads files of strangers: only clear messages come out, within bounds of time and memory.

python -m tests.fuzz pickle --minutes 10
python -m tests.fuzz all --minutes 1

What it finds is made smaller and put into tests/fuzz/regressions/SURFACE/, which the tests run; the exit code is
then 1. Cases run in processes of their own, which may crash: a case that ends its process is found too.
"""

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from random import Random

ROOT = Path(__file__).parents[2]
os.environ["HF_HUB_OFFLINE"] = "1"  # names of models in changed files are not looked up
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from fuzz.cases import Bench, limit_memory  # noqa: E402
from fuzz.findings import save  # noqa: E402
from fuzz.surfaces import SURFACES  # noqa: E402

from pruned_vllm.common.arguments import positive_float, seed  # noqa: E402

CASES = 200  # in one process
PATIENCE = 120  # seconds for one case that a signal does not stop
SHRINKING = 200, 30  # attempts, seconds


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("surface", choices=(*SURFACES, "all"))
    parser.add_argument("--minutes", type=positive_float, default=10.0, help="for each surface (default: %(default)g)")
    parser.add_argument("--seed", type=seed, default=int(time.time()), help="of the first case (default: the time)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # no thread may hold a lock while a process is forked
    chosen = list(SURFACES) if args.surface == "all" else [args.surface]
    return max(_fuzz(surface, args.minutes * 60, args.seed) for surface in chosen)


def _fuzz(surface: str, seconds: float, first: int) -> int:
    """Runs cases of one surface; returns the exit code."""
    found: dict[str, Path] = {}
    end, number = time.monotonic() + seconds, 0
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary) / "report.json"
        while time.monotonic() < end:
            name = list(SURFACES[surface])[number // CASES % len(SURFACES[surface])]
            report.unlink(missing_ok=True)
            _in_a_process(surface, name, first + number, end, Path(temporary))
            for content, problem in _read(report):
                what = problem.strip().splitlines()[-1][:160] + _place(problem)
                if what not in found:
                    found[what] = save(surface, name, content)
                    print(f"{surface}, {name}: {problem}\n-> {found[what]}", flush=True)
            number += CASES
    print(f"{surface}: {number:,} cases at most, {len(found)} findings")
    return int(bool(found))


def _place(problem: str) -> str:
    """Where a traceback ends, so that one fault counts once."""
    places = [line.strip() for line in problem.splitlines() if line.strip().startswith("File ")]
    return f" {places[-1]}" if places else ""


def _in_a_process(surface: str, name: str, first: int, end: float, directory: Path) -> None:
    """Runs up to CASES cases in a child; waits, and ends it where it hangs beyond every signal."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _child(surface, name, first, end, directory)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    beat = directory / "current"
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if status:
                _note(directory, beat.read_bytes() if beat.exists() else b"", f"the process ended with status {status}")
            return
        if beat.exists() and time.time() - beat.stat().st_mtime > PATIENCE:
            os.kill(child, 9)
            os.waitpid(child, 0)
            _note(directory, beat.read_bytes(), f"longer than {PATIENCE} seconds, and no signal stops it")
            return
        time.sleep(0.05)


def _child(surface: str, name: str, first: int, end: float, directory: Path) -> None:
    (directory / "current").write_bytes(b"")
    with tempfile.TemporaryDirectory(dir=directory) as place:
        os.chdir(place)
        bench = Bench(SURFACES[surface][name], Path(tempfile.mkdtemp(dir=place)))
        limit_memory()
        for number in range(first, first + CASES):
            if time.monotonic() > end:
                break
            content = bench.changed(Random(number))
            (directory / "current").write_bytes(content)
            if (problem := bench.problem(content)) is not None:
                content = _smaller(bench, content, problem, Random(number))
                _note(directory, content, bench.problem(content) or problem)


def _smaller(bench: Bench, content: bytes, problem: str, random: Random) -> bytes:
    """The content with slices taken out, as long as the same fault shows."""
    what = problem.strip().splitlines()[-1][:40]
    attempts, seconds = SHRINKING
    end = time.monotonic() + seconds
    for _ in range(attempts):
        if time.monotonic() > end:
            break
        length = max(1, len(content) // random.choice((2, 4, 16, 64)))
        at = random.randrange(max(1, len(content) - length + 1))
        shorter = content[:at] + content[at + length :]
        again = bench.problem(shorter) if shorter else None
        if again is not None and again.strip().splitlines()[-1][:40] == what:
            content = shorter
    return content


def _note(directory: Path, content: bytes, problem: str) -> None:
    with (directory / "report.json").open("a") as file:
        file.write(json.dumps({"content": content.hex(), "problem": problem}) + "\n")


def _read(report: Path) -> list[tuple[bytes, str]]:
    if not report.exists():
        return []
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    return [(bytes.fromhex(line["content"]), line["problem"]) for line in lines]


if __name__ == "__main__":
    sys.exit(main())
