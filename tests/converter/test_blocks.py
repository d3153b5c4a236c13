"""Tensors that are cut and multiplied block by block: what a whole tensor would become."""

from pathlib import Path

import numpy as np
import pytest
import torch

from converter import blocks, reading
from converter.blocks import Folding, Memory, count_not_finite
from converter.fold import Cut
from converter.matrices import LoadedMatrix, StoredMatrix, StridedMatrix
from converter.reading import OpenFiles
from pruned_vllm.common.padding import PAD
from pruned_vllm.formats.headers import StoredTensor, spread

BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}
BEFORE = b"what comes before"


def whole(tensor: torch.Tensor, cut: Cut, dtype: torch.dtype) -> torch.Tensor:
    """The definition: rows and columns taken, zeros for PAD, multiplied in float32 or float64, cast once."""
    result = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    for dim, index in ((0, cut.rows), (1, cut.columns)):
        if index is not None:
            result = torch.stack([result.select(dim, i) * (i != PAD) for i in index.tolist()], dim)
    if cut.row_factors is not None:
        result = (result.T * cut.row_factors).T
    if cut.column_factors is not None:
        result = result * cut.column_factors
    return result.to(dtype)


def stored(directory: Path, tensor: torch.Tensor) -> StoredMatrix:
    content = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    (directory / "weights").write_bytes(BEFORE + content + b"and after")
    header = StoredTensor(
        directory / "weights", "w", tuple(tensor.shape), "", (len(BEFORE), len(BEFORE) + len(content))
    )
    return StoredMatrix(OpenFiles(), header, tensor.dtype)


def across(directory: Path, tensor: torch.Tensor, seed: int) -> StridedMatrix:
    """The same stored transposed, its rows taking turns with those of `apart - 1` other matrices."""
    apart, place = 1 + seed % 3, seed % (1 + seed % 3)
    others = [tensor + 1 + number for number in range(apart)]
    others[place] = tensor
    content = torch.stack(others, 1).flatten(0, 1).t().contiguous().view(torch.uint8).numpy().tobytes()
    (directory / "across").write_bytes(BEFORE + content + b"and after")
    strides = (apart, apart * len(tensor)) if tensor.dim() == 2 else (apart,)
    start = len(BEFORE) + place * tensor.dtype.itemsize
    end = start + spread(tuple(tensor.shape), strides) * tensor.dtype.itemsize
    header = StoredTensor(directory / "across", "w", tuple(tensor.shape), "", (start, end), strides)
    return StridedMatrix(OpenFiles(), header, tensor.dtype)


def folded(matrix, cut: Cut, tensor: torch.Tensor, dtype: torch.dtype, monkeypatch, block_bytes: int) -> torch.Tensor:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block_bytes)
    folding, memory = Folding(matrix, cut, tensor.dim(), dtype), Memory()
    parts = []
    for block in folding.blocks():
        folding.expect(block)
        parts.append(torch.from_numpy(folding.fold(block, memory).copy()).view(dtype))
    return torch.cat(parts).view(folding.shape)


def runs(chance: np.random.Generator, size: int, unit: int) -> torch.Tensor:
    """An index of units that stay side by side, some left out, some padded, some moved."""
    units = np.flatnonzero(chance.random(size // unit) < 0.6)
    if chance.random() < 0.3:
        chance.shuffle(units)
    for _ in range(chance.integers(3)):
        units = np.insert(units, chance.integers(len(units) + 1), PAD)
    index = np.where(units[:, None] == PAD, PAD, units[:, None] * unit + np.arange(unit)).reshape(-1)
    return torch.from_numpy(index if len(index) else np.array([0]))


@pytest.mark.parametrize("seed", range(60))
def test_blocks_are_what_the_whole_tensor_becomes(tmp_path, monkeypatch, seed):
    chance = np.random.default_rng(seed)
    dtype, target = (list(BITS)[chance.integers(4)] for _ in range(2))
    unit = (1, 1, 4, 8)[chance.integers(4)]
    shape = (unit * int(chance.integers(1, 30)), unit * int(chance.integers(1, 30)))
    tensor = torch.from_numpy(chance.normal(size=shape)).to(dtype)
    rows, columns = (runs(chance, size, unit) if chance.random() < 0.7 else None for size in shape)
    factors = [
        torch.from_numpy(chance.normal(size=size if index is None else len(index))).float()
        if chance.random() < 0.5
        else None
        for index, size in zip((rows, columns), shape, strict=True)
    ]
    cut = Cut(rows, factors[0], columns, factors[1])
    monkeypatch.setattr(reading, "HOLE_BYTES", int(chance.choice([0, 64, 1 << 16])))
    expected = whole(tensor, cut, target)
    assert torch.equal(cut.apply(tensor), whole(tensor, cut, dtype)), "the same for a tensor in memory"
    size = int(chance.choice([1, 300, 1 << 20]))
    for matrix in (stored(tmp_path, tensor), across(tmp_path, tensor, seed), LoadedMatrix(tensor.T.contiguous().T)):
        assert torch.equal(folded(matrix, cut, tensor, target, monkeypatch, size), expected)


@pytest.mark.parametrize("dtype", BITS)
def test_vectors(tmp_path, monkeypatch, dtype):
    tensor = torch.linspace(-3, 5, 17, dtype=torch.float64).to(dtype)
    index, factors = torch.tensor([3, 4, PAD, 0, 16, PAD]), torch.linspace(0.1, 8, 6)
    for cut in (Cut(), Cut(rows=index), Cut(rows=index, row_factors=factors)):
        expected = whole(tensor[:, None], cut, dtype)[:, 0]
        for matrix in (stored(tmp_path, tensor), across(tmp_path, tensor, 1), LoadedMatrix(tensor)):
            assert torch.equal(folded(matrix, cut, tensor, dtype, monkeypatch, 1 << 20)[0], expected)


def test_more_rows_than_a_call_takes_buffers(tmp_path, monkeypatch):
    tensor = torch.randn(5000, 3)
    cut = Cut(rows=torch.arange(0, 5000, 2))
    result = folded(stored(tmp_path, tensor), cut, tensor, torch.float32, monkeypatch, 1 << 20)
    assert torch.equal(result, tensor[::2])


@pytest.mark.parametrize("dtype", BITS)
def test_numbers_that_are_not_finite_are_counted(dtype):
    info = torch.finfo(dtype)
    values = [0.0, -0.0, info.max, info.min, info.tiny, -info.tiny, info.tiny / 2, 1, -1]
    finite = torch.tensor(values, dtype=torch.float64).to(dtype)
    assert count_not_finite(finite.view(torch.uint8).numpy(), dtype) == 0
    assert count_not_finite(np.empty(0, np.uint8), dtype) == 0
    for bad in (float("nan"), float("inf"), float("-inf"), -float("nan")):
        alone = torch.tensor([bad], dtype=dtype)
        for tensor in (torch.cat((finite, alone)), torch.cat((-finite.abs(), alone, finite.abs(), alone))):
            assert count_not_finite(tensor.view(torch.uint8).numpy(), dtype) == int((~tensor.isfinite()).sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_pattern_of_bits(dtype):
    bits = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)
    for tensor in bits.view(dtype).split(16):
        assert count_not_finite(tensor.view(torch.uint8).numpy(), dtype) == int((~tensor.isfinite()).sum())
