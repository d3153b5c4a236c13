"""Experts' weights rounded to the nearest codes, for bench/ragged_moe.py. Scales are the largest magnitude over the
largest code; nothing is calibrated.

    gate_up, down, scales = quantize(*experts.rows(widths), SCHEMES["int8"])
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

from pruned_vllm.kernels.ragged_moe_arguments import Scales, run_offsets


class Scheme(NamedTuple):
    """How weights are stored.

    Attributes:
        codes: uint8 is 4 bits a column.
        largest: the code of the largest magnitude that shares a scale.
        group_size: columns, and channels of down, that share a scale, where it divides the hidden size, else 32, which
            the benchmark's sizes are multiples of. None: a scale for each row, and for each column of an expert.
        tolerance: what outputs may be off, as a share of the largest one, for random weights.
    """

    codes: torch.dtype
    largest: int
    group_size: int | None
    tolerance: float

    def group_of(self, hidden_size: int) -> int | None:
        return 32 if self.group_size and hidden_size % self.group_size else self.group_size


SCHEMES = {
    "int8": Scheme(torch.int8, 127, None, 0.1),
    "fp8": Scheme(torch.float8_e4m3fn, 448, None, 0.2),
    "int4": Scheme(torch.uint8, 7, 128, 0.5),
}


def quantize(
    gate_up: torch.Tensor, down: torch.Tensor, offsets: Sequence[int], scheme: Scheme
) -> tuple[torch.Tensor, torch.Tensor, Scales]:
    """Codes of gate_up [2, rows, hidden_size] and of down [rows, hidden_size], and their scales."""
    group_size = scheme.group_of(down.shape[1])
    parts = []
    for begin, end in pairwise(offsets):  # one at a time: float32 copies of all would take too much memory
        rows = gate_up[:, begin:end].float().unflatten(2, (-1, group_size or down.shape[1]))
        codes, scales = _round(rows, 3, scheme)
        runs = down[begin:end].float().split(group_size or max(1, end - begin))
        rounded = [_round(run, 0, scheme) for run in runs if len(run)]
        parts.append((_pack(codes.flatten(2), scheme), scales[..., 0], rounded))
    runs_of_all = [run for _, _, rounded in parts for run in rounded]
    return (
        torch.cat([codes for codes, _, _ in parts], 1),
        torch.cat([_pack(codes, scheme) for codes, _ in runs_of_all]),
        Scales(
            gate_up=torch.cat([scales for _, scales, _ in parts], 1).contiguous(),
            down=torch.cat([scales for _, scales in runs_of_all]),
            down_offsets=torch.tensor(run_offsets(offsets, group_size), dtype=torch.int32, device=down.device),
            group_size=group_size,
        ),
    )


def expert_bytes(widths: Sequence[int], hidden_size: int, scheme: Scheme | None) -> tuple[int, ...]:
    """What the weights of each expert, and their scales, take; without a scheme they are bfloat16."""
    if scheme is None:
        return tuple(3 * 2 * hidden_size * width for width in widths)
    group_size = scheme.group_of(hidden_size)
    bits, groups = 4 if scheme.codes == torch.uint8 else 8, hidden_size // (group_size or hidden_size)
    runs = [-(-width // (group_size or max(1, width))) for width in widths]
    return tuple(
        3 * hidden_size * width * bits // 8 + 4 * (2 * width * groups + run * hidden_size)
        for width, run in zip(widths, runs, strict=True)
    )


def _round(values: torch.Tensor, axis: int, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, those of 4 bits as integers yet, and scales along an axis of what shares one."""
    scales = values.abs().amax(axis, keepdim=True).clamp_min(1e-12) / scheme.largest
    numbers = values / scales
    if scheme.codes == torch.float8_e4m3fn:
        return numbers.to(scheme.codes), scales
    return numbers.round().to(torch.int8), scales


def _pack(codes: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    if scheme.codes != torch.uint8:
        return codes
    even, odd = (codes + 8).to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return even | odd << 4
