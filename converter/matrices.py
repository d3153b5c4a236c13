"""Matrices whose rows are read a few at a time, from a file or from a tensor in memory. A vector is one row."""

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from converter.reading import OpenFiles, Piece, pieces_of, runs_of
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
