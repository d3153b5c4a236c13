"""Which files of a model directory are its weights: one answer for every command. Pure Python.

Transformers reads model.safetensors where there is one, else the shards that model.safetensors.index.json names. vLLM
goes by the index where there is one, else it reads every *.safetensors. A directory that is accepted here means the
same to both; one that they read differently is refused, and the message names the files.

Weights are read from safetensors only. Pickles can run code when they are opened, so they are never opened.

A weight file may be a symbolic link to anywhere: the hub's cache consists of links into ../../blobs. What is behind a
link is read as safetensors or not at all. The index itself cannot name a file outside of its directory.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import is_inside, read_json

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"

# What to download of a model on the hub to learn whether and how its weights can be read.
WEIGHT_PATTERNS = ("model*.safetensors", INDEX_FILE, ADAPTER_CONFIG)

LARGEST_HEADER = 100_000_000  # bytes; what the safetensors library accepts

# Files in the name patterns of *.safetensors that vLLM does not take for weights of the model, or that are ours.
_NO_WEIGHTS = ("pruning_masks.safetensors", "consolidated*.safetensors")
# Formats that hold weights and are never read.
_UNREAD = (
    *("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle"),
    *("*.h5", "*.msgpack", "*.npz", "*.onnx", "*.gguf", "*.ggml", "consolidated*"),
)
# What a training run leaves beside the weights.
_TRAINING_STATE = ("training_args.bin", "optimizer.*", "scheduler.*", "scaler.*", "rng_state*.pth", "random_states_*")


def find_weight_files(directory: Path) -> list[Path]:
    """The safetensors files that hold the weights of the model in `directory`, in the order of their names.

    Raises:
        InputError: there are none, they are in another format, or Transformers and vLLM would not read the same.
    """
    names = _file_names(directory)
    _refuse_redirections(directory, names)
    indexed = _indexed_files(directory) if INDEX_FILE in names else []
    if SINGLE_FILE not in names:
        if not indexed:
            raise InputError(f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}{_hint(names)}")
        return [directory / name for name in indexed]
    if not indexed:
        others = [name for name in sorted(names) if fnmatch(name, "*.safetensors") and not _matches(name, _NO_WEIGHTS)]
        others.remove(SINGLE_FILE)
        if others:
            raise InputError(
                f"{directory} has {SINGLE_FILE} and, without {INDEX_FILE}, also {', '.join(others)}: Transformers "
                f"reads {SINGLE_FILE} alone, vLLM all of them; move away what does not belong to the model"
            )
    # An index none of whose shards exists is what save_pretrained left from an earlier, sharded save.
    elif indexed != [SINGLE_FILE] and any(_exists(directory / name) for name in indexed):
        raise InputError(
            f"{directory} has both {SINGLE_FILE} and {INDEX_FILE}, which names {indexed[0]}"
            f"{f' and {len(indexed) - 1} more' if len(indexed) > 1 else ''}: Transformers reads the former, vLLM the "
            "latter; delete those that are not meant"
        )
    return [directory / SINGLE_FILE]


def has_weight_files(directory: Path) -> bool:
    """Whether the directory has safetensors weights at all; `find_weight_files` says whether they can be used."""
    return any(os.path.lexists(directory / name) for name in (SINGLE_FILE, INDEX_FILE))


def unread_weights(directory: Path) -> list[str]:
    """The files of a directory that hold weights in formats that are never read, or an adapter; no subdirectories."""
    return sorted(name for name in _file_names(directory) if _is_unread(name) or name == ADAPTER_CONFIG)


def open_safetensors(path: Path, framework: str = "np") -> Any:
    """A safetensors file, its header checked against its length. Raises InputError.

    Args:
        framework: what its tensors are read as; "np" reads shapes and dtypes of all, also of those NumPy lacks.
    """
    if not path.is_file():  # a pipe would be waited for
        raise InputError(_absence(path))
    if not os.access(path, os.R_OK):
        raise InputError(f"{path} cannot be read: permission denied")
    try:
        return safe_open(path, framework=framework)
    except (OSError, SafetensorError) as error:
        with path.open("rb") as file:
            pointer = file.read(40).startswith(b"version https://git-lfs")
        fix = "it is a pointer of Git LFS: run git lfs pull" if pointer else "download or save it again"
        size = path.stat().st_size
        raise InputError(f"{path} ({size:,} bytes) is truncated or no safetensors file: {error}; {fix}") from None


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Tensor name -> dtype, shape and data_offsets of a safetensors file; offsets count from the start of the file.

    The library does not tell offsets. Raises InputError.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = os.fstat(file.fileno()).st_size
            if not 2 <= length <= min(LARGEST_HEADER, size - 8):
                raise ValueError(f"it says that its header has {length} bytes")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for entry in header.values():
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            if not 8 + length <= start <= end <= size:
                raise ValueError(f"its tensors end at byte {end}, the file at {size}")
            entry["data_offsets"] = start, end
            _ = entry["dtype"], tuple(entry["shape"])
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is truncated or no safetensors file: {error}; download or save it again") from None
    return header


@contextmanager
def replacing_weights(directory: Path) -> Iterator[None]:
    """Around `save_pretrained` into a directory: removes the single file or the index of an earlier save.

    Transformers removes the shards of an earlier save but leaves these two. A directory that was saved once in one
    file and once in shards would hold both, and readers would take the older.
    """
    files = (directory / SINGLE_FILE, directory / INDEX_FILE)

    def stamps() -> list[tuple[int, int] | None]:
        return [(file.stat().st_ino, file.stat().st_mtime_ns) if file.is_file() else None for file in files]

    before = stamps()
    yield
    stale = [file for file, old, new in zip(files, before, stamps(), strict=True) if old == new]
    if len(stale) == 1:
        stale[0].unlink(missing_ok=True)


def _file_names(directory: Path) -> set[str]:
    """Names of what is in a directory, links included, but not of subdirectories. Raises InputError."""
    try:
        return {path.name for path in directory.iterdir() if not path.is_dir()}
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{directory} is not a directory") from None


def _refuse_redirections(directory: Path, names: set[str]) -> None:
    """Refuses what makes Transformers, and it alone, read more or other files than the weights."""
    if ADAPTER_CONFIG in names:
        raise InputError(
            f"{directory / ADAPTER_CONFIG}: Transformers would add this adapter to the weights without a word; merge "
            "it into them with PEFT (merge_and_unload), or move it away"
        )
    if "config.json" in names and (other := read_json(directory / "config.json").get("transformers_weights")):
        raise InputError(
            f"{directory / 'config.json'}: transformers_weights is {other!r}, which Transformers alone would read in "
            f"place of {SINGLE_FILE}; remove the key, or rename the file"
        )


def _indexed_files(directory: Path) -> list[str]:
    """The file names in the index, each once, sorted. Raises InputError."""
    path = directory / INDEX_FILE
    if not path.is_file():
        raise InputError(_absence(path))
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path} has no weight_map")
    outside = {repr(file) for file in weight_map.values() if not is_inside(file)}
    if outside:
        raise InputError(f"{path} names files outside of its directory; nothing was read:", sorted(outside))
    return sorted(set(weight_map.values()))


def _absence(path: Path) -> str:
    if path.is_symlink() and not _exists(path):
        return f"{path} is a link to {path.readlink()}, which is missing; download it again"
    return f"{path} is no file" if _exists(path) else f"{path} is missing"


def _exists(path: Path) -> bool:
    with suppress(OSError):  # a loop of links
        return path.exists()
    return False


def _hint(names: set[str]) -> str:
    """What may have been meant where there are no weights that can be read."""
    if unread := sorted(name for name in names if _is_unread(name)):
        return (
            f", but {', '.join(unread)}: weights are read from safetensors only, pickled weights are never read; save "
            "the model with save_pretrained of Transformers first"
        )
    others = sorted(name for name in names if fnmatch(name, "*.safetensors") and not _matches(name, _NO_WEIGHTS))
    return f", but {', '.join(others)}; name them as save_pretrained does" if others else ""


def _is_unread(name: str) -> bool:
    return _matches(name, _UNREAD) and not _matches(name, _TRAINING_STATE)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
