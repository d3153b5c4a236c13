"""Reads bytes of files at any place, by any thread, into memory that is used again.

Nothing is mapped into memory: where a mapped file is truncated, or its disk fails, the process dies of SIGBUS, and no
message says why. A read says it.
"""

import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pruned_vllm.common.errors import InputError
from pruned_vllm.common.padding import PAD

HOLE_BYTES = 1 << 16  # what lies between two wanted parts is read along up to this size: that is cheaper than a call
MOST_BUFFERS = 1024  # of one call; Linux's IOV_MAX


@dataclass(frozen=True)
class Piece:
    """A part of a file that is read at once.

    Attributes:
        offset: where it begins in the file.
        targets: place in memory and length of each of its parts, one after another; None: the part is not wanted.
    """

    offset: int
    targets: list[tuple[int | None, int]]

    @property
    def size(self) -> int:
        return sum(length for _, length in self.targets)


def pieces_of(rows: np.ndarray, offset: int, row_bytes: int) -> list[Piece]:
    """What to read of a matrix that begins at `offset`, so that these rows lie in memory one after another.

    Rows that are PAD are left out: their places in memory stay as they are.
    """
    pieces: list[Piece] = []
    end = -1  # of the last piece, in the file
    for place, start, count in runs_of(rows):
        begin, length = offset + start * row_bytes, count * row_bytes
        if pieces and 0 <= begin - end <= HOLE_BYTES:
            if begin > end:
                pieces[-1].targets.append((None, begin - end))
            pieces[-1].targets.append((place * row_bytes, length))
        else:
            pieces.append(Piece(begin, [(place * row_bytes, length)]))
        end = begin + length
    return pieces


def runs_of(index: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Place, first value and length of each run of ascending neighbours in an index, without those of PAD."""
    if not len(index):
        return
    breaks = np.flatnonzero((np.diff(index) != 1) | (index[:-1] == PAD)) + 1
    places = np.concatenate(([0], breaks))
    lengths = np.diff(np.concatenate((places, [len(index)])))
    for place, start, length in zip(places.tolist(), index[places].tolist(), lengths.tolist(), strict=True):
        if start != PAD:
            yield place, start, length


class OpenFiles:
    """Files that are open for reading until this object goes."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._stamps: dict[Path, tuple[int, ...] | None] = {}
        self._lock = threading.Lock()

    def watch(self, file: Path) -> None:
        """Has `check_unchanged` notice what happens to a file from now on.

        It may be opened minutes after its header has told what lies where in it, or be read by others.
        """
        if file not in self._stamps:
            self._stamps[file] = _stamp(file)

    def expect(self, file: Path, pieces: Sequence[Piece]) -> None:
        """Lets the disk fetch what will be read soon. Raises InputError where the file cannot be opened."""
        descriptor = self._descriptor(file)
        for piece in pieces:
            os.posix_fadvise(descriptor, piece.offset, piece.size, os.POSIX_FADV_WILLNEED)

    def read(self, file: Path, pieces: Sequence[Piece], memory: memoryview, unwanted: memoryview) -> None:
        """Reads pieces of a file.

        Args:
            memory: where the targets of the pieces are.
            unwanted: HOLE_BYTES of memory for what is not wanted.

        Raises:
            InputError: the file is gone, ends too early, or its disk fails.
        """
        descriptor = self._descriptor(file)
        for piece in pieces:
            buffers = [
                unwanted[:length] if place is None else memory[place : place + length]
                for place, length in piece.targets
            ]
            try:
                _read_all(descriptor, buffers, piece.offset)
            except EOFError as error:
                raise InputError(f"{file} was truncated while it was read: it ends at byte {error}") from None
            except OSError as error:
                raise InputError(f"{file} cannot be read: {error.strerror or error}") from None

    def check_unchanged(self) -> None:
        """Raises InputError where a file was written to, or another took its place, since it is watched."""
        changed = [
            str(file) for file, stamp in self._stamps.items() if _stamp(self._descriptors.get(file, file)) != stamp
        ]
        if changed:
            raise InputError("Files were changed while they were read; run the command again:", sorted(changed))

    def _descriptor(self, file: Path) -> int:
        with self._lock:
            if file not in self._descriptors:
                try:
                    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
                except FileNotFoundError:
                    raise InputError(f"{file} is gone; it was there when the command began") from None
                except OSError as error:
                    raise InputError(f"{file} cannot be read: {error.strerror or error}") from None
                self._descriptors[file] = descriptor
                self.watch(file)
            return self._descriptors[file]

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)


def _stamp(file: Path | int) -> tuple[int, ...] | None:
    """What is another once a file, or the one of a descriptor, was changed; None where there is none."""
    try:
        facts = os.stat(file)
    except OSError:
        return None
    return facts.st_ino, facts.st_size, facts.st_mtime_ns


def _read_all(descriptor: int, buffers: list[memoryview], offset: int) -> None:
    """Fills all buffers. Raises EOFError with the byte at which the file ends too early."""
    first = 0
    while first < len(buffers):
        done = os.preadv(descriptor, buffers[first : first + MOST_BUFFERS], offset)
        if not done:
            raise EOFError(offset)
        offset += done
        while first < len(buffers) and done >= len(buffers[first]):
            done -= len(buffers[first])
            first += 1
        if done:
            buffers[first] = buffers[first][done:]
