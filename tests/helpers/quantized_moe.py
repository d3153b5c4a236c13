"""Quantized ragged experts: random codes and scales, and the float64 weights that they stand for."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch
from helpers.ragged_moe import (
    PLAIN,
    Case,
    Inputs,
    Variant,
    compare,
    guarded,
    poisoned_memory,
    random_inputs,
    reference,
)

from pruned_vllm.kernels.ragged_moe_arguments import Scales, run_offsets


class Kind(NamedTuple):
    """How weights are stored.

    Attributes:
        codes: their dtype; uint8 is 4 bits a column.
        group_size: the largest that groups may have; None: a scale for each row, and for each column of an expert.
    """

    codes: torch.dtype
    group_size: int | None

    def __str__(self) -> str:
        name = {torch.int8: "int8", torch.float8_e4m3fn: "fp8", torch.uint8: "int4"}[self.codes]
        return name if self.group_size is None else f"{name}-groups"

    def takes(self, case: Case) -> bool:
        return self.codes != torch.uint8 or case.hidden % 2 == 0

    def group_of(self, hidden: int) -> int | None:
        """The largest divisor of `hidden` that groups may have."""
        if self.group_size is None:
            return None
        step = 2 if self.codes == torch.uint8 else 1
        return max(size for size in range(step, self.group_size + 1, step) if hidden % size == 0)


KINDS = tuple(Kind(codes, group) for codes in (torch.int8, torch.float8_e4m3fn, torch.uint8) for group in (None, 32))
# Groups that are several steps of a product, and some that are not.
LONG_GROUPS = (Kind(torch.int8, 128), Kind(torch.uint8, 128), Kind(torch.float8_e4m3fn, 300))


def numbers(codes: torch.Tensor) -> torch.Tensor:
    """What codes are, in float64; with 4 bits a column there are twice as many columns."""
    if codes.dtype != torch.uint8:
        return codes.double()
    return torch.stack([codes % 16, codes // 16], -1).flatten(-2).double() - 8


class Quantized(NamedTuple):
    """Inputs with codes, their scales, and the same inputs with weights in float64."""

    inputs: Inputs
    scales: Scales
    exact: Inputs


def quantized_inputs(case: Case, dtype: torch.dtype, kind: Kind, seed: int, device: str) -> Quantized:
    inputs = random_inputs(case, dtype, seed, device)
    rows, hidden = inputs.down.shape
    stored = hidden // 2 if kind.codes == torch.uint8 else hidden
    group_size = kind.group_of(hidden)
    runs = run_offsets(inputs.offsets.tolist(), group_size)
    spread = numbers(random_codes((4096,), kind.codes)).std()  # of codes, so that scaled weights have the usual size
    scales = Scales(
        gate_up=_random_scales((2, rows, hidden // (group_size or hidden)), spread * hidden**0.5, device),
        down=_random_scales((runs[-1], hidden), spread, device),
        down_offsets=guarded(torch.tensor(runs, dtype=torch.int32, device=device)),
        group_size=group_size,
    )
    codes = [guarded(random_codes((*shape, stored), kind.codes).to(device)) for shape in ((2, rows), (rows,))]
    return with_codes(inputs, *codes, scales)


def with_codes(inputs: Inputs, gate_up: torch.Tensor, down: torch.Tensor, scales: Scales) -> Quantized:
    """Inputs whose weights are replaced."""
    hidden, offsets, parts = scales.down.shape[1], inputs.offsets.tolist(), []
    for (begin, end), (first, last) in zip(pairwise(offsets), pairwise(scales.down_offsets.tolist()), strict=True):
        channels = scales.group_size or end - begin
        parts.append(scales.down[first:last].double().repeat_interleave(channels, 0)[: end - begin])
    exact = inputs._replace(
        gate_up=numbers(gate_up) * scales.gate_up.double().repeat_interleave(scales.group_size or hidden, 2),
        down=numbers(down) * torch.cat(parts),
    )
    return Quantized(inputs._replace(gate_up=gate_up, down=down), scales, exact)


def random_codes(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Every code as likely as any other, but for NaN."""
    codes = torch.randint(0, 256, shape).to(torch.uint8)
    if dtype == torch.float8_e4m3fn:
        codes = codes.where(codes % 128 != 127, 0)
    return codes.view(dtype)


def encode(integers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Codes of small integers, an even number of columns in two to a byte: the other way round than `numbers`."""
    if dtype != torch.uint8:
        return integers.to(dtype)
    nibbles = (integers + 8).to(torch.uint8).unflatten(-1, (-1, 2))
    return nibbles[..., 0] + 16 * nibbles[..., 1]


def _random_scales(shape: tuple[int, ...], divisor: torch.Tensor, device: str) -> torch.Tensor:
    return guarded(((torch.rand(shape) + 0.5) / divisor).to(device))


def check_quantized(
    ragged_moe: Callable,
    case: Case,
    dtype: torch.dtype,
    kind: Kind,
    seed: int,
    device: str,
    variant: Variant = PLAIN,
    **options,
) -> str:
    """Calls a kernel on random inputs; "" or what is wrong with its output."""
    quantized = quantized_inputs(case, dtype, kind, seed, device)
    arguments = variant.arguments(quantized.exact)
    expected, allowed = reference(quantized.exact, **arguments)
    with poisoned_memory():
        actual = ragged_moe(*quantized.inputs, scales=replace(quantized.scales, **options), **arguments)
    return compare(actual, expected, allowed, dtype)


def check_quantized_triton(
    case: Case, dtype: torch.dtype, kind: Kind, seed: int, device: str, variant: Variant = PLAIN
) -> str:
    """The same for the Triton kernel."""
    from pruned_vllm.kernels.ragged_moe_triton import ragged_moe

    may_quantize = kind.codes != torch.float8_e4m3fn  # which changes nothing for others
    return check_quantized(ragged_moe, case, dtype, kind, seed, device, variant, quantize_input=may_quantize)


def check_quantized_input(
    case: Case, dtype: torch.dtype, group_size: int | None, seed: int, device: str, variant: Variant = PLAIN
) -> str:
    """The same where the input is quantized, too. Its numbers are codes times a power of two, the largest code among
    them, so that this changes nothing; what enters the down projection is rounded."""
    from pruned_vllm.kernels.ragged_moe_triton import ragged_moe

    inputs, scales, exact = quantized_inputs(case, dtype, Kind(torch.float8_e4m3fn, group_size), seed, device)
    codes = numbers(random_codes(inputs.x.shape, torch.float8_e4m3fn))
    codes[:, 0] = 448
    inputs.x.copy_(codes * 2.0 ** torch.randint(-9, -5, (len(codes), 1)))
    arguments = variant.arguments(inputs)
    expected, allowed = reference(exact, fp8_hidden=True, **arguments)
    with poisoned_memory():
        actual = ragged_moe(*inputs, scales=replace(scales, quantize_input=True), **arguments)
    return compare(actual, expected, allowed, dtype)


def quantize_rows_problem(rows: int, columns: int, device: str) -> str:
    """What is wrong with codes and scales of random rows, one of zeros."""
    from pruned_vllm.kernels.ragged_moe_codes import quantize_rows

    values = torch.randn(rows, columns, device=device) * 10.0 ** torch.randint(-6, 4, (rows, 1), device=device)
    values[0] = 0
    codes, scales = quantize_rows(values)
    expected = torch.where(values.abs().amax(1) > 0, values.abs().amax(1) / 448, 1)
    if not torch.allclose(scales, expected, rtol=1e-6, atol=0):
        return f"scales are {scales}, not {expected}"
    # Half the distance between two codes, which is at most 1/8 of a number and at least 2^-9.
    error = (codes.float() - values / scales[:, None]).abs()
    wrong = error > torch.maximum(values.abs() / scales[:, None] / 16, torch.tensor(2.0**-10)) * (1 + 1e-5)
    return f"{int(wrong.sum())} codes are not the nearest" if wrong.any() or error.isnan().any() else ""
