"""Cuts and folds tensors a block of rows at a time, in memory that is used again for every block."""

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from converter.fold import Cut
from converter.matrices import Matrix
from converter.reading import HOLE_BYTES, runs_of
from pruned_vllm.common.padding import PAD

BLOCK_BYTES = 4 << 20  # of the rows that are read at once: what is computed with them stays in the caches

_UNSIGNED: dict[int, type[np.unsignedinteger]] = {2: np.uint16, 4: np.uint32, 8: np.uint64}
_SIGNED: dict[int, type[np.signedinteger]] = {2: np.int16, 4: np.int32, 8: np.int64}
_INFINITY = {  # the bits of +inf: those of larger numbers are NaN
    torch.bfloat16: 0x7F80,
    torch.float16: 0x7C00,
    torch.float32: 0x7F80_0000,
    torch.float64: 0x7FF0_0000_0000_0000,
}


class Memory(threading.local):
    """Memory of one thread, by what it is for; it grows to the most that was asked for."""

    def __init__(self) -> None:
        self._arrays: dict[str, np.ndarray] = {}
        self.unwanted = memoryview(bytearray(HOLE_BYTES))

    def array(self, name: str, size: int) -> np.ndarray:
        """Bytes, with what was in them before."""
        if name not in self._arrays or len(self._arrays[name]) < size:
            self._arrays[name] = np.empty(size, np.uint8)
        return self._arrays[name][:size]


@dataclass(frozen=True)
class Columns:
    """The columns that are taken of a matrix, as units of `width` columns that stay side by side.

    Attributes:
        units: indices of units in the source; where there is PAD, any.
        padded: places of PAD in `units`.
    """

    units: np.ndarray
    padded: np.ndarray
    width: int

    @classmethod
    def of_index(cls, index: np.ndarray, num_columns: int) -> "Columns":
        """The widest units that an index of columns, or PAD, can be written in."""
        numbers = [number for run in runs_of(index) for number in run]
        width = math.gcd(num_columns, len(index), *numbers) or 1
        units = index[::width]
        padded = np.flatnonzero(units == PAD)
        return cls(np.where(units == PAD, 0, units // width), padded, width)

    def take(self, matrix: np.ndarray, into: np.ndarray) -> None:
        """Args: matrix, into: [rows, columns] of the same dtype."""
        shape = (len(matrix), -1, self.width)
        into = into.reshape(shape)
        np.take(matrix.reshape(shape), self.units, axis=1, out=into, mode="clip")  # clip: written to `out` directly
        if len(self.padded):
            into[:, self.padded] = 0


class Folding:
    """One tensor's way from what is stored to what is written: cut, multiplied, and cast once.

    Products are computed in float32 (float64 for float64), rows' factors first.

    Args:
        matrix: what is stored.
        cut: what happens to it.
        dtype: of what is written.
    """

    def __init__(self, matrix: Matrix, cut: Cut, dim: int, dtype: torch.dtype) -> None:
        if dim == 1:  # one row, whose columns are cut
            cut = Cut(columns=cut.rows, column_factors=cut.row_factors)
        self.matrix, self.dtype = matrix, dtype
        self._cut = cut
        self._rows = np.arange(matrix.num_rows) if cut.rows is None else cut.rows.numpy()
        self._has_padded_rows = bool((self._rows == PAD).any())
        columns = None if cut.columns is None else cut.columns.numpy()
        self._columns = None
        if columns is not None and not np.array_equal(columns, np.arange(matrix.num_columns)):
            self._columns = Columns.of_index(columns, matrix.num_columns)
        self.shape = len(self._rows), matrix.num_columns if columns is None else len(columns)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row that is written."""
        return self.shape[1] * self.dtype.itemsize

    def blocks(self, parts: int = 1) -> Iterator[slice]:
        """Rows that are written, so many at a time as make BLOCK_BYTES of what is read, or one of `parts` of that."""
        step = max(1, BLOCK_BYTES // max(1, parts * self.matrix.num_columns * self.matrix.dtype.itemsize))
        for start in range(0, self.shape[0], step):
            yield slice(start, min(start + step, self.shape[0]))

    def expect(self, block: slice) -> None:
        """Says that `fold` will be called for these rows soon."""
        self.matrix.expect(self._rows[block])

    def rows(self, block: slice, memory: Memory) -> torch.Tensor:
        """These rows [rows, columns] as they are written; valid until the next call with this memory."""
        return torch.from_numpy(self.fold(block, memory)).view(self.dtype).view(-1, self.shape[1])

    def fold(self, block: slice, memory: Memory) -> np.ndarray:
        """Bytes of these rows as they are written; they stay until the next call with this memory."""
        rows, itemsize = self._rows[block], self.matrix.dtype.itemsize
        array = memory.array("stored", len(rows) * self.matrix.num_columns * itemsize)
        self.matrix.read(rows, array, memory.unwanted)
        if self._has_padded_rows:
            array.reshape(len(rows), -1)[rows == PAD] = 0
        if self._columns is not None:
            taken = memory.array("taken", len(rows) * self.shape[1] * itemsize)
            unsigned = _UNSIGNED[itemsize]
            stored, target = (part.view(unsigned).reshape(len(rows), -1) for part in (array, taken))
            self._columns.take(stored, target)
            array = taken
        return self._multiplied_and_cast(array, block, memory)

    def _multiplied_and_cast(self, array: np.ndarray, block: slice, memory: Memory) -> np.ndarray:
        dtype, cut = self.matrix.dtype, self._cut
        if cut.row_factors is not None or cut.column_factors is not None:
            array, dtype = _cast(array, dtype, torch.promote_types(dtype, torch.float32), memory, "product")
            product = torch.from_numpy(array).view(dtype).view(-1, self.shape[1])
            if cut.row_factors is not None:
                product.mul_(cut.row_factors[block, None])
            if cut.column_factors is not None:
                product.mul_(cut.column_factors)
        return _cast(array, dtype, self.dtype, memory, "cast")[0]


def _cast(
    array: np.ndarray, dtype: torch.dtype, target: torch.dtype, memory: Memory, name: str
) -> tuple[np.ndarray, torch.dtype]:
    """Bytes of numbers of `dtype` as those of `target`."""
    if dtype == target:
        return array, target
    result = memory.array(name, array.nbytes // dtype.itemsize * target.itemsize)
    torch.from_numpy(result).view(target).copy_(torch.from_numpy(array).view(dtype))
    return result, target


def count_not_finite(array: np.ndarray, dtype: torch.dtype) -> int:
    """How many numbers of `dtype` in these bytes are NaN or infinite.

    Two maxima of the bits as integers tell whether there is any, faster than floating point can. Without a sign, what
    is not finite is the largest among the positive numbers; read without a sign, among the negative ones.
    """
    infinity = _INFINITY[dtype]
    unsigned, sign = array.view(_UNSIGNED[dtype.itemsize]), 1 << (8 * dtype.itemsize - 1)
    if not len(unsigned):
        return 0
    if unsigned.view(_SIGNED[dtype.itemsize]).max() < infinity and unsigned.max() < (sign | infinity):
        return 0
    return int(((unsigned & unsigned.dtype.type(infinity)) == infinity).sum())
