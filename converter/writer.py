"""Safetensors files whose tensors are written in any order, by any thread: the header comes first.

Sizes and dtypes of all tensors are known beforehand, so it is known where each belongs. The files are byte for byte
what `save_file` of the safetensors library makes of the same tensors.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from pruned_vllm.common.files import write_json
from pruned_vllm.formats.headers import ELEMENT_BYTES
from pruned_vllm.formats.tensors import Shapes
from pruned_vllm.formats.weights import INDEX_FILE, SINGLE_FILE

ALIGNMENT = 8  # of the place where the content begins; spaces fill up the header
WRITTEN_BYTES = {"I64": 8, **ELEMENT_BYTES, "I32": 4, "F8_E4M3": 1, "I8": 1}  # of a number, by dtype
# In a file, which aligns all of them.
_DTYPE_ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "F8_E4M3", "I8")


@dataclass(frozen=True)
class Shard:
    """A file of weights.

    Attributes:
        header: what the file begins with.
        places: where each tensor begins in the file.
        content_bytes: of all tensors.
    """

    file: str
    header: bytes
    places: dict[str, int]
    content_bytes: int


def lay_out(
    shapes: Shapes, dtypes: Mapping[str, str], max_shard_bytes: int, origins: Mapping[str, str] | None = None
) -> list[Shard]:
    """Spreads tensors over files in their order; a file has at least one, and no more than `max_shard_bytes` else.

    Args:
        origins: what tensors are made of; neighbours of the same origin stay in one file.
    """
    sizes = {name: WRITTEN_BYTES[dtypes[name]] * math.prod(shape) for name, shape in shapes.items()}
    groups: list[list[str]] = []
    room = 0
    for _, together in groupby(sizes, key=lambda name: (origins or {}).get(name, name)):
        names = list(together)
        size = sum(sizes[name] for name in names)
        if not groups or size > room:
            groups.append([])
            room = max_shard_bytes
        groups[-1] += names
        room -= size
    files = [f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors" for number in range(len(groups))]
    if len(groups) == 1:
        files = [SINGLE_FILE]
    return [_shard(file, names, shapes, dtypes, sizes) for file, names in zip(files, groups, strict=True)]


def _shard(file: str, names: list[str], shapes: Shapes, dtypes: Mapping[str, str], sizes: Mapping[str, int]) -> Shard:
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(names, key=lambda name: (_DTYPE_ORDER.index(dtypes[name]), name)):
        start, end = end, end + sizes[name]
        entries[name] = {"dtype": dtypes[name], "shape": list(shapes[name]), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    places = {name: len(header) + entry["data_offsets"][0] for name, entry in entries.items() if name in shapes}
    return Shard(file, header, places, end)


def write_index(directory: Path, shards: list[Shard]) -> None:
    """Says which file has which tensor, unless there is but one file."""
    if len(shards) > 1:
        weight_map = {name: shard.file for shard in shards for name in shard.places}
        total = sum(shard.content_bytes for shard in shards)
        write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


class ShardFile:
    """A file that is being written."""

    def __init__(self, name: str, descriptor: int) -> None:
        self._name, self._descriptor = name, descriptor

    def write(self, content: memoryview, place: int) -> None:
        """Writes bytes to a place in the file. Raises OSError, which names the file."""
        left = content.cast("B")
        try:
            while len(left):
                done = os.pwrite(self._descriptor, left, place)
                left, place = left[done:], place + done
        except OSError as error:
            raise OSError(error.errno, f"cannot write {self._name}: {error.strerror}") from error


@contextmanager
def shard_file(directory: Path, shard: Shard) -> Iterator[ShardFile]:
    """The file of a shard, with its header, open for its tensors. Raises OSError."""
    descriptor = os.open(directory / shard.file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        file = ShardFile(shard.file, descriptor)
        file.write(memoryview(shard.header), 0)
        yield file
    finally:
        os.close(descriptor)
