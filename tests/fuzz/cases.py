"""One case: a changed file is read, and what comes out is either a result or one clear message.

with Bench(seed, directory) as bench:
    problem = bench.problem(content)      # None, or what was wrong
"""

import contextlib
import io
import os
import resource
import shutil
import signal
import traceback
from collections.abc import Iterator
from pathlib import Path
from random import Random

from fuzz.mutations import MUTATORS
from fuzz.surfaces import Seed

SECONDS = 10  # of processor time for a case; a valid input takes a tenth of one
MEMORY = 2 << 30  # bytes that a case may ask for
LONGEST_MESSAGE = 1 << 20  # characters
CHANGES = (1, 1, 1, 2, 3, 6)
EVIL = "fuzz-evil"  # the file that commands in the pickles would make, if anything ran them


class OutOfTime(BaseException):
    """Not an Exception, so that nothing takes it for a damaged file."""


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    """Raises OutOfTime in code that takes longer than SECONDS of processor time."""

    def stop(signum, frame):
        raise OutOfTime(f"longer than {SECONDS} seconds")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def limit_memory() -> None:
    """Of this process, to what it has and MEMORY."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)


class Bench:
    """A valid input in a directory of its own, one file of which is changed for every case."""

    def __init__(self, seed: Seed, directory: Path) -> None:
        self._seed, self._directory = seed, directory
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            self._input = seed.make(directory / "in")
        self._file = directory / "in" / seed.file
        self._out = directory / "results" / "out"
        self._out.parent.mkdir()
        self._names = self._listing()
        self.valid = self._file.read_bytes()
        problem = self.problem(self.valid)
        if problem is not None or self.code != 0:
            raise AssertionError(f"the valid input is refused: {problem} {self.message}")

    def changed(self, random: Random) -> bytes:
        """The valid content with a few changes."""
        content = self.valid
        for _ in range(random.choice(CHANGES)):
            content = MUTATORS[self._seed.mutator](content, random)
        return content

    def problem(self, content: bytes) -> str | None:
        """What is wrong with how the command takes this content of the file; None if nothing is."""
        self._file.write_bytes(content)
        self.code, self.message = -1, ""
        output, errors = io.StringIO(), io.StringIO()
        try:
            with time_limit(), contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
                self.code = self._seed.run(self._input, self._out)
        except (Exception, OutOfTime, SystemExit):
            return traceback.format_exc(limit=-6)
        finally:
            self.message = errors.getvalue()
            left = [path.name for path in self._out.parent.iterdir()]
            shutil.rmtree(self._out.parent, ignore_errors=True)
            self._out.parent.mkdir()
        if self.code not in (0, 2):
            return f"exit code {self.code}: {self.message[-500:]}"
        if self.code == 2 and left:
            return f"exit code 2, but there is {left}"
        if self.code == 2 and not self.message.strip():
            return "exit code 2 without a message"
        if len(self.message) > LONGEST_MESSAGE or "Cannot allocate memory" in self.message:
            return f"a message of {len(self.message):,} characters: {self.message[:200]}"
        if os.path.exists(EVIL):
            os.unlink(EVIL)
            return "what the pickle says was run"
        if self._listing() != self._names or self._file.read_bytes() != content:
            return "the input was changed"
        return None

    def _listing(self) -> list[str]:
        return sorted(str(path) for path in (self._directory / "in").rglob("*"))
