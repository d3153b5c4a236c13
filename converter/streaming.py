"""Writes the tensors of a plan: reading, folding and writing overlap on all cores, a block of rows each.

Memory is needed for a few blocks of each thread, whatever the size of the model; with an adapter for the largest
weight that it changes too. What is written depends on nothing but the plan: each block is computed by one thread, in
the same way whichever it is.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from converter.blocks import Folding, Memory, count_not_finite
from converter.checkpoint import DTYPES
from converter.fold import Cut
from converter.matrices import LoadedMatrix, Matrix
from converter.plan import Plan
from converter.source import WeightChanges
from converter.writer import Shard, ShardFile, lay_out, shard_file, write_index
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.progress import progress_bar
from pruned_vllm.common.signals import uninterrupted

EXPECTED_BLOCKS = 32  # that the disk is told of before they are read
MERGED_BYTES = 1 << 30  # of weights that an adapter is merged into at the same time, in float32; one at least


def write_tensors(plan: Plan, directory: Path, max_shard_bytes: int, threads: int | None = None) -> None:
    """Writes the weights of the converted model.

    Args:
        threads: that read, fold and write; None: some more than there are cores, since some wait for the disk.

    Raises:
        InputError: a source cannot be read or changed meanwhile, or a value is not finite.
        OSError: the disk is full or cannot be written.
    """
    writing = _Writing(plan, threads or min(32, len(os.sched_getaffinity(0)) + 4))
    shapes = plan.pruned.tensor_shapes()
    dtypes = {name: DTYPES[plan.dtype_of(name)] for name in shapes}
    shards = lay_out(shapes, dtypes, max_shard_bytes)
    total = sum(shard.content_bytes for shard in shards)
    with (
        _one_thread_an_operation(),
        progress_bar(total=total, desc="converting", unit="B", unit_scale=True) as progress,
    ):
        for shard in shards:
            with shard_file(directory, shard) as file:
                writing.write(shard, file, progress.update)
    plan.checkpoint.check_unchanged()
    write_index(directory, shards)


@dataclass(frozen=True)
class _Part:
    """A part of a tensor that a thread writes.

    Attributes:
        size: in bytes.
        is_last: of its tensor.
        bad: how many of its numbers are not finite, once it is written.
    """

    name: str
    size: int
    is_last: bool
    bad: Future[int]


class _Writing:
    def __init__(self, plan: Plan, threads: int) -> None:
        self._plan, self._threads, self._memory = plan, threads, Memory()
        self._shapes = plan.pruned.tensor_shapes()
        self._changed = plan.source.changes.names if plan.source.changes is not None else set()
        sizes = [4 * torch.Size(plan.checkpoint.tensors[name].shape).numel() for name in self._changed]
        self._merging = threading.Semaphore(max(1, MERGED_BYTES // max(sizes, default=MERGED_BYTES)))

    def write(self, shard: Shard, file: ShardFile, report: Callable[[int], object]) -> None:
        """Writes the tensors of a shard; reports bytes as they are written."""
        pending: deque[_Part] = deque()
        bad = 0

        def finish() -> None:
            """Waits for the block that was begun first: so the first of several problems is always the same."""
            nonlocal bad
            part = pending.popleft()
            bad += part.bad.result()
            if part.is_last and bad:
                raise InputError(self._not_finite(part.name, bad))
            report(part.size)

        # In the order in which they lie on the disk.
        tensors = self._plan.checkpoint.tensors
        names = sorted(shard.places, key=lambda name: (tensors[name].file, tensors[name].span))
        with _workers(self._threads) as pool:
            for name in names:
                for part in self._begin(name, shard.places[name], file, pool):
                    pending.append(part)
                    if len(pending) >= max(EXPECTED_BLOCKS, 2 * self._threads):
                        finish()
            while pending:
                finish()

    def _begin(self, name: str, place: int, file: ShardFile, pool: ThreadPoolExecutor) -> Iterator[_Part]:
        """Has a tensor written to its place, part by part."""
        folding = self._folding(name, self._plan.checkpoint.matrix(name))
        changes = self._plan.source.changes
        if changes is not None and name in self._changed:
            size = folding.shape[0] * folding.row_bytes
            yield _Part(name, size, True, pool.submit(self._write_merged, changes, name, place, file))
            return
        for block in folding.blocks():
            folding.expect(block)
            size = (block.stop - block.start) * folding.row_bytes
            written = pool.submit(self._write_block, folding, block, place, file)
            yield _Part(name, size, block.stop == folding.shape[0], written)

    def _folding(self, name: str, matrix: Matrix) -> Folding:
        cut = self._plan.cuts.get(name, Cut())
        shape = self._shapes[name]
        folding = Folding(matrix, cut, len(shape), self._plan.dtype_of(name))
        if folding.shape != (shape if len(shape) == 2 else (1, *shape)):
            raise AssertionError(f"{name}: cut to {list(folding.shape)}, the geometry says {list(shape)}")
        return folding

    def _write_block(self, folding: Folding, block: slice, place: int, file: ShardFile) -> int:
        result = folding.fold(block, self._memory)
        bad = count_not_finite(result, folding.dtype)
        file.write(result.data, place + block.start * folding.row_bytes)
        return bad

    def _write_merged(self, changes: WeightChanges, name: str, place: int, file: ShardFile) -> int:
        """An adapter is merged into a weight as a whole."""
        with self._merging:
            merged = changes.merge(name, self._plan.checkpoint.read(name))
            folding = self._folding(name, LoadedMatrix(merged))
            return sum(self._write_block(folding, block, place, file) for block in folding.blocks())

    def _not_finite(self, name: str, count: int) -> str:
        plan, done = self._plan, []
        if name in self._changed:
            done.append("the adapter was merged")
        if name in plan.cuts:
            done.append("the masks were folded in")
        if plan.dtype is not None:
            done.append(f"it was cast to {str(plan.dtype).removeprefix('torch.')}")
        after = f" after {' and '.join(done)}" if done else ""
        return (
            f"{name}: {count} values are NaN or infinite in {plan.checkpoint.tensors[name].dtype}{after}; check the "
            "weights, or store them in a dtype with a larger range"
        )


@contextmanager
def _workers(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that are through with what they began when the block ends: nobody writes into a file that was closed."""
    pool = ThreadPoolExecutor(threads)
    try:
        yield pool
    finally:
        with uninterrupted():
            pool.shutdown(cancel_futures=True)


@contextmanager
def _one_thread_an_operation() -> Iterator[None]:
    """Keeps torch from spreading an operation over cores that are busy, and the same sums in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
