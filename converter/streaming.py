"""Writes the tensors of a plan: reading, folding, rounding and writing overlap on all cores, a block of rows each.

Memory is needed for a few blocks of each thread, whatever the size of the model; with an adapter for the largest
weight that it changes too. What is written depends on nothing but the plan: each block is computed by one thread, in
the same way whichever it is.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from converter.blocks import Folding, count_not_finite
from converter.checkpoint import TORCH_DTYPES
from converter.folded import FoldedTensors
from converter.plan import Plan
from converter.quantize.quantization import Written
from converter.writer import Shard, ShardFile, lay_out, shard_file, write_index
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.progress import progress_bar
from pruned_vllm.common.signals import uninterrupted

EXPECTED_BLOCKS = 32  # that the disk is told of before they are read


def write_tensors(plan: Plan, directory: Path, max_shard_bytes: int, threads: int | None = None) -> None:
    """Writes the weights of the converted model.

    Args:
        threads: that read, fold and write; None: some more than there are cores, since some wait for the disk.

    Raises:
        InputError: a source cannot be read or changed meanwhile, or a value is not finite.
        OSError: the disk is full or cannot be written.
    """
    written = plan.written
    writing = _Writing(plan, written, threads or min(32, len(os.sched_getaffinity(0)) + 4))
    shards = lay_out(written.shapes, written.dtypes, max_shard_bytes, written.origins)
    total = sum(shard.content_bytes for shard in shards)
    title = "converting" if plan.quantization is None else "quantizing"
    with (
        _one_thread_an_operation(),
        progress_bar(total=total, desc=title, unit="B", unit_scale=True) as progress,
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
    def __init__(self, plan: Plan, written: Written, threads: int) -> None:
        self._plan, self._written, self._threads = plan, written, threads
        self._folded = FoldedTensors(plan)
        self._sizes: dict[str, int] = {}  # bytes of all that is made of a tensor
        for name, size in written.sizes.items():
            origin = written.origins[name]
            self._sizes[origin] = self._sizes.get(origin, 0) + size
        self._round: Callable[[torch.Tensor, torch.dtype], dict[str, torch.Tensor]] | None = None
        if plan.quantization is not None:
            from converter.quantize.library import Rounding  # an import of seconds

            self._round = Rounding(plan.quantization.scheme, plan.quantization.group_size).round

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
        origins = dict.fromkeys(self._written.origins[name] for name in shard.places)
        names = sorted(origins, key=lambda name: (tensors[name].file, tensors[name].span))
        with _workers(self._threads) as pool:
            for name in names:
                for part in self._begin(name, shard, file, pool):
                    pending.append(part)
                    if len(pending) >= max(EXPECTED_BLOCKS, 2 * self._threads):
                        finish()
            while pending:
                finish()

    def _begin(self, name: str, shard: Shard, file: ShardFile, pool: ThreadPoolExecutor) -> Iterator[_Part]:
        """Has a tensor written to its place, part by part."""
        if name in self._folded.changed:
            yield _Part(name, self._sizes[name], True, pool.submit(self._write_merged, name, shard, file))
            return
        folding = self._folded.folding(name)
        num_rows = folding.shape[0]
        for block in self._folded.blocks(name, folding):
            folding.expect(block)
            size = self._sizes[name] * block.stop // num_rows - self._sizes[name] * block.start // num_rows
            written = pool.submit(self._write_block, name, folding, block, shard, file)
            yield _Part(name, size, block.stop == num_rows, written)

    def _write_merged(self, name: str, shard: Shard, file: ShardFile) -> int:
        """An adapter is merged into a weight as a whole."""
        with self._folded.merging:
            folding = self._folded.folding(name)
            blocks = self._folded.blocks(name, folding)
            return sum(self._write_block(name, folding, block, shard, file) for block in blocks)

    def _write_block(self, name: str, folding: Folding, block: slice, shard: Shard, file: ShardFile) -> int:
        """Writes some rows of what is made of a tensor; returns how many of their numbers are not finite."""
        result = folding.fold(block, self._folded.memory)
        bad = count_not_finite(result, folding.dtype)
        quantization = self._plan.quantization
        if quantization is None or self._round is None or not quantization.quantizes(name):
            file.write(result.data, shard.places[name] + block.start * folding.row_bytes)
            return bad
        if bad:
            return bad
        weight = torch.from_numpy(result).view(folding.dtype).view(-1, folding.shape[1])
        parts = self._round(weight, TORCH_DTYPES[self._written.dtypes[f"{name}_scale"]])
        if parts.pop("_shape", None) is not None and block.start == 0:  # of the weight, not of these rows
            file.write(torch.tensor(folding.shape).numpy().data, shard.places[f"{name}_shape"])
        for suffix, part in parts.items():
            content = part.contiguous().view(torch.uint8).numpy()
            file.write(content.data, shard.places[f"{name}{suffix}"] + block.start * content.nbytes // len(weight))
        return bad

    def _not_finite(self, name: str, count: int) -> str:
        plan, done = self._plan, []
        if name in self._folded.changed:
            done.append("the adapter was merged")
        if name in plan.cuts and plan.source.pruning is None:  # else it was converted before
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
