"""Which files of a directory a command wrote, and which are the user's. Pure Python.

`.pruned-vllm.json` in a directory lists the former with their sizes and digests of their content:

    {"writer": "convert-pruned", "files": {"config.json": "1234 5d0a91c207be44f1", ...}}

Whatever is not in the list, or is something else now, is the user's. The size alone does not tell: a digit that was
changed by hand leaves it, and so does a training that saves its weights in place. Files up to 16 MiB are read whole, of
larger ones 4096 pieces.
"""

import filecmp
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import file_facts, read_json, write_json
from pruned_vllm.common.filesystem import sync

MANIFEST = ".pruned-vllm.json"
REPORT_WRITER = "report"  # writes a directory into what another command wrote, and that command may replace both
KEPT = ".kept"  # added to the name of a user's file whose own name a command needs


def write_manifest(directory: Path, writer: str) -> None:
    """Lists all files that `directory` holds now."""
    files = {str(path.relative_to(directory)): file_facts(path) for path in _files(directory)}
    write_json(directory / MANIFEST, {"writer": writer, "files": dict(sorted(files.items()))})


def written_by(directory: Path, writer: str) -> bool:
    """Whether `writer` wrote `directory`."""
    return bool(_manifest(directory)) and _manifest(directory)["writer"] == writer


def changed_files(directory: Path) -> list[str]:
    """Files that are no longer what the command wrote."""
    written, users = _written(directory), users_files(directory)
    return [name for name in users if name in written]


def users_files(directory: Path) -> list[str]:
    """Names of the user's files, relative to a directory that has a manifest."""
    written = _written(directory)
    names = {str(path.relative_to(directory)): path for path in _files(directory)}
    return sorted(name for name, path in names.items() if name not in written or written[name] != file_facts(path))


def carry_over(old: Path, new: Path) -> list[str]:
    """Gives the user's files in `old` to `new` as well; they stay in `old`. Returns their names in `new`.

    A file is linked, so that both are the same and whoever has it open goes on writing to it; it is copied where the
    file system has no links. Where a command wrote a file of that name, the user's gets KEPT added to it.
    """
    targets = []
    for name in users_files(old):
        target = new / name
        while os.path.lexists(target):
            target = target.with_name(target.name + KEPT)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(old / name, target, follow_symlinks=False)
        except OSError:
            shutil.copy2(old / name, target, follow_symlinks=False)
        if target.is_file():
            sync(target)
        sync(target.parent)
        targets.append(str(target.relative_to(new)))
    return targets


def only_in(old: Path, new: Path) -> list[str]:
    """The user's files in `old` that `new` does not have; none where `old` has no manifest."""
    if not _manifest(old):
        return []
    return [
        name
        for name in users_files(old)
        if not any(_are_same(old / name, new / found) for found in (name, name + KEPT))
    ]


def _manifest(directory: Path) -> dict:
    """The content of the manifest; empty where it is missing or damaged."""
    try:
        content = read_json(directory / MANIFEST)
    except (InputError, OSError):
        return {}
    is_valid = isinstance(content.get("writer"), str) and isinstance(content.get("files"), dict)
    return content if is_valid else {}


def _written(directory: Path) -> dict[str, str]:
    """Names and facts of what commands wrote into `directory`, reports and manifests included."""
    written = dict(_manifest(directory)["files"])
    for part in (directory, *(path.parent for path in directory.glob(f"*/{MANIFEST}"))):
        if part == directory or written_by(part, REPORT_WRITER):
            files = _manifest(part)["files"] | {MANIFEST: file_facts(part / MANIFEST)}
            written |= {str((part / name).relative_to(directory)): facts for name, facts in files.items()}
    return written


def _files(directory: Path) -> Iterator[Path]:
    """Everything but directories; of symbolic links the links themselves."""
    return (path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir())


def _are_same(one: Path, other: Path) -> bool:
    if not os.path.lexists(other):
        return False
    if os.path.samestat(one.lstat(), other.lstat()):
        return True
    return one.is_file() and other.is_file() and filecmp.cmp(one, other, shallow=False)
