"""The tensors of a plan as they are before they are rounded to fewer bits: cut, folded, and in their dtype."""

import math
import threading
from collections.abc import Iterator

import torch

from converter.blocks import Folding, Memory
from converter.fold import Cut
from converter.matrices import LoadedMatrix, Matrix
from converter.plan import Plan

MERGED_BYTES = 1 << 30  # of weights that an adapter is merged into at the same time, in float32; one at least
QUANTIZED_PARTS = 8  # of a block: to round numbers takes some times their memory


class FoldedTensors:
    """The tensors of a plan, for any thread.

    Attributes:
        memory: of each thread.
        changed: names of the tensors that an adapter is merged into.
    """

    def __init__(self, plan: Plan) -> None:
        self.memory, self._changes = Memory(), plan.source.changes
        self.changed = set[str]() if self._changes is None else self._changes.names
        self._plan, self._shapes = plan, plan.pruned.tensor_shapes()
        sizes = [4 * torch.Size(plan.checkpoint.tensors[name].shape).numel() for name in self.changed]
        self.merging = threading.Semaphore(max(1, MERGED_BYTES // max(sizes, default=MERGED_BYTES)))

    def folding(self, name: str) -> Folding:
        """The way of a tensor from its file. One that an adapter changes is merged now, and in memory as a whole."""
        checkpoint = self._plan.checkpoint
        if self._changes is not None and name in self.changed:
            matrix: Matrix = LoadedMatrix(self._changes.merge(name, checkpoint.read(name)))
        else:
            matrix = checkpoint.matrix(name)
        shape = self._shapes[name]
        folding = Folding(matrix, self._plan.cuts.get(name, Cut()), len(shape), self._plan.dtype_of(name))
        if folding.shape != (math.prod(shape[:-1]), shape[-1]):
            raise AssertionError(f"{name}: cut to {list(folding.shape)}, the geometry says {list(shape)}")
        return folding

    def blocks(self, name: str, folding: Folding) -> Iterator[slice]:
        """The rows of a tensor that are computed at a time."""
        quantization = self._plan.quantization
        return folding.blocks(QUANTIZED_PARTS if quantization is not None and quantization.quantizes(name) else 1)

    def rows(self, name: str) -> Iterator[tuple[slice, torch.Tensor]]:
        """A matrix, some rows [rows, columns] at a time; they are valid until the next ones."""
        folding = self.folding(name)
        for block in self.blocks(name, folding):
            yield block, folding.rows(block, self.memory)

    def read(self, name: str) -> torch.Tensor:
        """All of a tensor."""
        parts = torch.cat([rows.clone() for _, rows in self.rows(name)])
        return parts.view(self._shapes[name])
