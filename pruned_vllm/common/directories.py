"""Output directories that appear whole or not at all, and replace nothing but what the same command wrote. Pure Python.

    with atomic_directory(Path("out"), writer="convert-pruned", overwrite=True) as directory:
        ...  # write into directory

While the block runs, `directory` is `.out.XXXXXXXX.partial` beside `out`, locked by this process. It gets a list of its
files (manifest.py), is brought to the disk, gets the user's files that `out` holds, and then takes the place of `out`:

- by an exchange of the two names in one step, so that there is a whole `out` at every moment, also when the process
  is killed or the power fails;
- where the system has no such step (macOS, NFS), by two renames: `out` becomes `.out.XXXXXXXX.replaced`, then the new
  directory becomes `out`. A run that is killed in between leaves no `out`, and the next run puts the old one back.

What was replaced goes only then. What a killed run leaves beside `out` goes at the next run, which says so. A process
that has files of the old `out` open goes on reading them; one that opens files by their names meanwhile may get some
of the old and some of the new.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pruned_vllm.common.errors import InputError
from pruned_vllm.common.filesystem import exchange, locked, sync
from pruned_vllm.common.manifest import carry_over, changed_files, only_in, write_manifest, written_by
from pruned_vllm.common.signals import uninterrupted


def prepare_output(path: Path, *, writer: str, overwrite: bool) -> None:
    """Cleans up what a killed run left beside the output directory `path`, and refuses one that exists.

    With `overwrite` a directory may be replaced, but only one that the command `writer` wrote itself, and no file of
    it that was changed since. Raises InputError.
    """
    path = path.resolve()
    _recover(path)
    _check_replaceable(path, writer, overwrite)


@contextmanager
def atomic_directory(path: Path, *, writer: str, overwrite: bool) -> Iterator[Path]:
    """Yields an empty directory that becomes `path` when the block ends, and vanishes when it raises.

    With `overwrite` it replaces the files that an earlier run of the command `writer` left in `path`; the user's own
    files there stay.

    Raises:
        InputError: see `prepare_output`.
        OSError: the disk is full or cannot be written.
    """
    path = path.resolve()
    prepare_output(path, writer=writer, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    with locked(partial):
        try:
            yield partial
            _complete(partial, writer)
            with uninterrupted():
                _check_replaceable(path, writer, overwrite)  # it may have appeared meanwhile
                _take_place(partial, path)
        finally:
            with uninterrupted():
                _clean_up(partial, path)
    sync(path.parent)


def _check_replaceable(path: Path, writer: str, overwrite: bool) -> None:
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise InputError(f"{path} exists; choose another directory, or replace it with --overwrite")
    if not written_by(path, writer):
        raise InputError(f"{path} was not written by this command, so it is not replaced; remove it yourself")
    if changed := changed_files(path):
        raise InputError(
            f"{path} holds files that were changed since this command wrote them, so it is not replaced; move them "
            "away, or remove it yourself:",
            changed,
        )


def _complete(partial: Path, writer: str) -> None:
    """Readable for whom the umask says, listed, and on the disk."""
    write_manifest(partial, writer)
    umask = os.umask(0)
    os.umask(umask)
    for path in (partial, *partial.rglob("*")):  # mkdtemp made the directory private, and safetensors its files
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
        sync(path)


def _take_place(partial: Path, path: Path) -> None:
    """`partial` becomes `path`; what was there becomes `partial` or its `.replaced`."""
    if not path.exists():
        partial.rename(path)
        return
    shutil.copymode(path, partial)
    if kept := carry_over(path, partial):
        print(f"Kept in {path}, for this command did not write them: {_listed(kept)}")
    if not exchange(partial, path):
        path.rename(_replaced(partial))
        partial.rename(path)


def _replaced(partial: Path) -> Path:
    return partial.with_suffix(".replaced")


def _clean_up(partial: Path, path: Path) -> list[Path]:
    """Ends what a run began, however far it came, and returns the directories that are gone.

    A directory that holds files of the user's which `path` lacks stays.
    """
    replaced = _replaced(partial)
    if replaced.exists() and not path.exists():  # the run ended between its two renames
        replaced.rename(path)
        print(f"Put back {path}, which an interrupted run had moved to {replaced}")
    leftovers = [directory for directory in (partial, replaced) if directory.exists()]
    for directory in leftovers:
        if names := only_in(directory, path):
            print(f"{directory} stays, for {path} lacks files in it that no command wrote: {_listed(names)}")
        else:
            shutil.rmtree(directory, ignore_errors=True)
    return [directory for directory in leftovers if not directory.exists()]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _recover(path: Path) -> None:
    """Cleans up after runs that were killed, not after those that are alive."""
    name = re.compile(re.escape(f".{path.name}.") + r"[a-z0-9_]{8}\.(partial|replaced)")
    siblings = path.parent.iterdir() if path.parent.is_dir() else ()
    found = {sibling for sibling in siblings if name.fullmatch(sibling.name) and sibling.is_dir()}
    for partial in sorted({directory.with_suffix(".partial") for directory in found}):
        replaced = _replaced(partial)
        try:
            with locked(partial if partial in found else replaced) as is_dead, uninterrupted():
                if is_dead or (is_dead is None and replaced in found and not path.exists()):
                    for directory in _clean_up(partial, path):
                        print(f"Removed {directory}, which an interrupted run left")
                else:
                    print(f"{partial} stays: another run may be writing it; if there is none, remove it")
        except FileNotFoundError:
            pass  # the other run ended
