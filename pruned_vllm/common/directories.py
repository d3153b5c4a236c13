"""Output directories that appear whole or not at all. Pure Python."""

import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pruned_vllm.common.errors import InputError


def check_output(path: Path, overwrite: bool, is_ours: Callable[[Path], bool]) -> None:
    """Refuses an output directory that exists.

    With `overwrite` a directory may be replaced, but only one that the command has written itself, which `is_ours`
    tells. Raises InputError.
    """
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise InputError(f"{path} exists; choose another directory, or replace it with --overwrite")
    if not (path.is_dir() and is_ours(path)):
        raise InputError(f"{path} was not written by this command, so it is not replaced; remove it yourself")


@contextmanager
def atomic_directory(path: Path, *, overwrite: bool, is_ours: Callable[[Path], bool]) -> Iterator[Path]:
    """Yields an empty directory that becomes `path` when the block ends, and vanishes when it raises.

    It lies beside `path`, so that the final step is a rename. What `path` held before is removed only after the new
    content took its place. See `check_output` for what may be replaced.
    """
    path = path.resolve()
    check_output(path, overwrite, is_ours)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    replaced = temporary.with_suffix(".replaced")
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)  # mkdtemp made it private, and safetensors its files
        for file in temporary.rglob("*"):
            file.chmod((0o777 if file.is_dir() else 0o666) & ~umask)
        check_output(path, overwrite, is_ours)  # it may have appeared meanwhile
        if path.exists():
            path.rename(replaced)
        temporary.rename(path)
    except BaseException:
        with _uninterrupted():
            if replaced.exists() and not path.exists():
                replaced.rename(path)
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Lets a clean-up end: a second Ctrl-C would leave half of it."""
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread only
        yield
        return
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.signal(signum, signal.SIG_IGN) for signum in signals]
    try:
        yield
    finally:
        for signum, handler in zip(signals, handlers, strict=True):
            signal.signal(signum, handler)
