"""Files of a model directory: JSON, read with clear errors, and paths that files name. Pure Python."""

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from types import UnionType
from typing import Any

from pruned_vllm.common.errors import InputError

PIECE_BYTES = 4096  # of a file that is sampled
PIECES = 4096  # of a large file
LARGEST_TEXT = 1 << 20  # characters of a list of layers
FINETUNING_FILE = "finetuning.json"  # in a converted model that finetune-pruned has trained since


def cache_directory() -> Path:
    """Where what can be made again is kept between runs; it need not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pruned-vllm"


def read_json(path: Path, kind: type | UnionType = dict) -> Any:
    """The object in a JSON file, or what `kind` is. Raises InputError when that is missing or damaged."""
    if os.path.exists(path) and not path.is_file():  # a pipe would be waited for, /dev/zero fill the memory
        raise InputError(f"{path} is no file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, kind):
        wanted = "object" if kind is dict else "object or list"
        raise InputError(f"{path} must hold a JSON {wanted}, not a {type(content).__name__}")
    return content


def read_lines(path: Path) -> list[str]:
    """The lines of a small text file, stripped, without empty ones; none where it is no such file.

    Only the beginning of a large file is read.
    """
    if not path.is_file():  # a pipe would be waited for
        return []
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(LARGEST_TEXT)
    except (OSError, UnicodeError):
        return []
    return [line.strip() for line in text.splitlines() if line.strip()]


def sample(file: int, start: int, end: int, pieces: int) -> bytes:
    """Some of the bytes from `start` to `end` of an open file, enough to tell whether they have changed.

    All of them if they are no more than `pieces` of PIECE_BYTES, else so many pieces at equal distances.
    """
    size = end - start
    if size <= pieces * PIECE_BYTES:
        return os.pread(file, size, start)
    starts = [start + piece * (size - PIECE_BYTES) // (pieces - 1) for piece in range(pieces)]
    return b"".join(os.pread(file, PIECE_BYTES, place) for place in starts)


def file_facts(path: Path) -> str:
    """Size and digest of a file, of a symbolic link those of its target's name; of large files PIECES are read."""
    facts, content = path.lstat(), b""
    if stat.S_ISLNK(facts.st_mode):
        content = os.fsencode(path.readlink())
    elif stat.S_ISREG(facts.st_mode):
        with path.open("rb", buffering=0) as file:
            content = sample(file.fileno(), 0, facts.st_size, PIECES)
    return f"{facts.st_size} {hashlib.sha256(content).hexdigest()[:16]}"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file; what it held before stays until the new content is complete."""
    temporary = path.with_name(f"{path.name}.partial")
    temporary.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    temporary.replace(path)


def is_inside(file: Any) -> bool:
    """Whether a path that a checkpoint names is plain and below its directory."""
    return (
        isinstance(file, str)
        and file.isprintable()
        and "\\" not in file
        and not PurePosixPath(file).is_absolute()
        and ".." not in PurePosixPath(file).parts
    )
