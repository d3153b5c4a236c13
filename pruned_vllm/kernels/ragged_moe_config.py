"""Tile sizes of the ragged mixture-of-experts kernels, by how many tokens an expert sees. Pure tables, easy to re-tune.

Picked by hand for shapes like Qwen3-30B-A3B (128 experts, 8 per token, hidden size 2048, widths up to 768) and not yet
measured. No run-time tuning: it would launch kernels inside a CUDA graph's capture.

Whatever is put here must fit the smallest shared memory of a GPU with bfloat16, 99 KiB (GeForce 30 and 40):
num_stages * (rows of input + weights) * block_k numbers, with two weight matrices in gate_up.
"""

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """What one program computes of a projection: block_n output columns, block_k terms of the sum at a time."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def launch_options(self, group_size: int = 0) -> dict[str, int]:
        """What a kernel is launched with. A step is not longer than a group of weights with one scale, but no shorter
        than 32, which products of 8-bit numbers need."""
        group = max(32, 1 << (group_size - 1).bit_length()) if group_size else self.block_k
        return {
            "BLOCK_N": self.block_n,
            "BLOCK_K": min(self.block_k, group),
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


class Config(NamedTuple):
    """One row of the tables.

    Attributes:
        up_to: used while (token, choice) pairs per expert are at most this.
        is_sorted: False: no schedule, every pair is its own tile.
        block_m: rows of a tile; 16 is the least that tensor cores take.
        group: tiles that share a block of weights in the L2 cache; 1 where an expert has about one tile.
        gate_up, down: tiles of the two launches.
    """

    up_to: float
    is_sorted: bool
    block_m: int
    group: int
    gate_up: Tile
    down: Tile


# Decode reads each weight once, so it is bound by memory and wants many programs with much in flight each. At batch 1,
# 8 experts of at most 768 channels, on average half: 16 channels per program make some 190 programs for an H100's 132
# multiprocessors, 64 hidden units per program in the down projection 256. There the launch of a schedule would cost a
# good part of what the products do, and while pairs are few against experts hardly two of them meet in one expert.
_HALF_PRECISION = (
    Config(0.25, False, 16, 1, Tile(16, 256, 4, 3), Tile(64, 128, 4, 4)),
    Config(16, True, 16, 1, Tile(64, 64, 4, 4), Tile(128, 64, 4, 4)),
    Config(64, True, 64, 4, Tile(64, 64, 4, 3), Tile(128, 64, 4, 3)),
    Config(float("inf"), True, 128, 8, Tile(64, 64, 8, 3), Tile(128, 64, 8, 3)),
)
# float32 without TF32 runs outside the tensor cores: smaller tiles, or registers spill.
_SINGLE_PRECISION = (
    Config(0.25, False, 16, 1, Tile(16, 64, 4, 3), Tile(32, 64, 4, 3)),
    Config(16, True, 16, 1, Tile(32, 32, 4, 3), Tile(64, 32, 4, 3)),
    Config(64, True, 32, 4, Tile(32, 32, 4, 3), Tile(64, 32, 4, 3)),
    Config(float("inf"), True, 64, 8, Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
)
# Products of 8-bit codes, inputs quantized too: for batches that take as long as multiplying does. Rows are as long in
# bytes as those of 16 bits above.
QUANTIZED_INPUT_ABOVE = 16  # (token, choice) pairs per expert
_EIGHT_BITS = (
    Config(64, True, 64, 4, Tile(64, 128, 4, 3), Tile(128, 128, 4, 3)),
    Config(float("inf"), True, 128, 8, Tile(64, 128, 8, 3), Tile(128, 128, 8, 3)),
)
_TABLES = {
    torch.float32: _SINGLE_PRECISION,
    torch.bfloat16: _HALF_PRECISION,
    torch.float16: _HALF_PRECISION,
    torch.float8_e4m3fn: _EIGHT_BITS,
}


def configs(dtype: torch.dtype) -> tuple[Config, ...]:
    """All rows of the table for inputs of a dtype, by rising `up_to`."""
    return _TABLES[dtype]


def choose_config(pairs_per_expert: float, dtype: torch.dtype) -> Config:
    """The tile sizes for a batch: tokens * topk / experts, known from shapes alone."""
    return next(config for config in configs(dtype) if pairs_per_expert <= config.up_to)
