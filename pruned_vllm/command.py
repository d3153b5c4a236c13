"""What the commands promise: problems end in a clear message and exit code 2; outputs appear whole or not at all.

Pure Python; shared by `convert-pruned` and `learn-masks`.
"""

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pruned_vllm.errors import InputError


def run_command(name: str, body: Callable[[], None]) -> int:
    """Runs `body` and returns the exit code of the command `name`.

    0 when it went well, 2 for problems that the user can mend (InputError, a full disk, missing permission), 130 when
    interrupted. Termination counts as an interrupt, so that outputs in progress are cleaned up.
    """

    def interrupt(signum, frame):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        body()
    except InputError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{name}: {error.strerror or error}: {error.filename or ''}".rstrip(": "), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def check_output(path: Path, overwrite: bool, marker: str) -> None:
    """Refuses an output directory that exists.

    With `overwrite` a directory may be replaced, but only one that this command could have written: it contains the
    file `marker`. Raises InputError.
    """
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise InputError(f"{path} exists; choose another directory, or replace it with --overwrite")
    if not (path / marker).is_file():
        raise InputError(f"{path} has no {marker}, so --overwrite does not replace it; remove it yourself")


@contextmanager
def atomic_directory(path: Path, *, overwrite: bool, marker: str) -> Iterator[Path]:
    """Yields an empty directory that becomes `path` when the block ends, and vanishes when it raises.

    It lies beside `path`, so that the final step is a rename. What `path` held before is removed only after the new
    content took its place. See `check_output` for what may be replaced.
    """
    path = path.resolve()
    check_output(path, overwrite, marker)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    replaced = temporary.with_suffix(".replaced")
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)  # mkdtemp made it private
        if path.exists():
            path.rename(replaced)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if replaced.exists() and not path.exists():
            replaced.rename(path)
        raise
    finally:
        if path.exists():
            shutil.rmtree(replaced, ignore_errors=True)
