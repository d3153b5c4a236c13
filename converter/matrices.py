"""Matrices whose rows are read a few at a time, from a file or from a tensor in memory. A vector is one row."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from converter.reading import OpenFiles, Piece, pieces_of, runs_of
from pruned_vllm.common.padding import PAD
from pruned_vllm.formats.headers import StoredTensor


class Matrix(Protocol):
    """Rows that can be read by any thread.

    Attributes:
        num_rows, num_columns: of a vector 1 and its length.
    """

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def num_rows(self) -> int: ...

    @property
    def num_columns(self) -> int: ...

    def expect(self, rows: np.ndarray) -> None:
        """Says that these rows will be read soon."""

    def read(self, rows: np.ndarray, into: np.ndarray, unwanted: memoryview) -> None:
        """Reads rows. Those that are PAD are left as they are.

        Args:
            into: bytes, a row's beside another's.
            unwanted: HOLE_BYTES of memory that may be written to.

        Raises:
            InputError: a file cannot be read.
        """


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix in a file, the elements of a row one after another, rows one after another."""

    files: OpenFiles
    tensor: StoredTensor
    dtype: torch.dtype

    @property
    def num_rows(self) -> int:
        return math.prod(self.tensor.shape[:-1])

    @property
    def num_columns(self) -> int:
        return self.tensor.shape[-1]

    def expect(self, rows: np.ndarray) -> None:
        self.files.expect(self.tensor.file, self._pieces(rows))

    def read(self, rows: np.ndarray, into: np.ndarray, unwanted: memoryview) -> None:
        self.files.read(self.tensor.file, self._pieces(rows), into.data, unwanted)

    def _pieces(self, rows: np.ndarray) -> list[Piece]:
        return pieces_of(rows, self.tensor.span[0], self.num_columns * self.dtype.itemsize)


class StridedMatrix(StoredMatrix):
    """A matrix in a file whose rows lie across it: one that is stored transposed, or taking turns with another.

    Rows are read together with what lies between them, column by column. So those of one call should be near each
    other, and memory is needed for all numbers from the first to the last of them.
    """

    def expect(self, rows: np.ndarray) -> None:
        start, end = self.tensor.span
        self.files.expect(self.tensor.file, [Piece(start, [(None, end - start)])])

    def read(self, rows: np.ndarray, into: np.ndarray, unwanted: memoryview) -> None:
        if len(self.tensor.shape) == 1:  # a vector is read as a matrix of one column
            rows = np.arange(self.num_columns)
        there = rows != PAD
        wanted = rows[there]
        if not len(wanted):
            return
        size, unsigned = self.dtype.itemsize, np.dtype(f"u{self.dtype.itemsize}")
        row_stride, *others = self.tensor.strides
        columns, column_stride = (self.num_columns, others[0]) if others else (1, 0)
        first, last = int(wanted.min()), int(wanted.max())
        length = ((last - first) * row_stride + 1) * size
        start = self.tensor.span[0] + first * row_stride * size
        places = ((start + column * column_stride * size, column * length) for column in range(columns))
        pieces = [Piece(offset, [(place, length)]) for offset, place in places]
        stored = np.empty(columns * length, np.uint8)
        self.files.read(self.tensor.file, pieces, stored.data, unwanted)
        numbers = stored.view(unsigned).reshape(columns, -1)[:, ::row_stride]
        into.view(unsigned).reshape(len(rows), columns)[there] = numbers[:, wanted - first].T


class PackedMatrix(StoredMatrix):
    """A matrix of MXFP4 numbers, widened to bfloat16 by Transformers."""

    def expect(self, rows: np.ndarray) -> None:
        for matrix, stored in self._stored(rows[rows != PAD]):
            matrix.expect(stored)

    def read(self, rows: np.ndarray, into: np.ndarray, unwanted: memoryview) -> None:
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors  # late: an import of seconds

        there = rows != PAD
        parts = []
        for matrix, stored in self._stored(rows[there]):
            part = np.empty((len(stored), matrix.num_columns), np.uint8)
            matrix.read(stored, part.reshape(-1), unwanted)
            parts.append(torch.from_numpy(part))
        blocks, scales = parts
        if not len(scales):
            return
        widened = convert_moe_packed_tensors(blocks.view(1, *scales.shape, -1), scales[None], dtype=self.dtype)[0].T
        target = torch.from_numpy(into).view(self.dtype).view(len(rows), self.num_columns)
        target[torch.from_numpy(there)] = widened

    def _stored(self, rows: np.ndarray) -> Iterator[tuple[StoredMatrix, np.ndarray]]:
        """The blocks and the scales, with the rows of them."""
        packed = self.tensor.packed
        if packed is None:
            raise ValueError(f"{self.tensor.key} in {self.tensor.file} is not stored as MXFP4")
        for tensor in (packed.blocks, packed.scales):
            yield StoredMatrix(self.files, tensor, torch.uint8), packed.first + packed.step * rows


@dataclass(frozen=True)
class LoadedMatrix:
    """A matrix in memory, in whatever order."""

    tensor: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def num_rows(self) -> int:
        return math.prod(self.tensor.shape[:-1])

    @property
    def num_columns(self) -> int:
        return self.tensor.shape[-1]

    def expect(self, rows: np.ndarray) -> None:
        pass

    def read(self, rows: np.ndarray, into: np.ndarray, unwanted: memoryview) -> None:
        matrix = self.tensor.reshape(self.num_rows, self.num_columns)
        target = torch.from_numpy(into).view(self.dtype).view(len(rows), self.num_columns)
        for place, start, count in runs_of(rows):
            target[place : place + count].copy_(matrix[start : start + count])
