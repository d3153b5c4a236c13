"""Codes of quantized numbers in Triton: codes of weights become numbers, numbers of the input become codes.

What codes are is said in ragged_moe_arguments.py. Names of sizes are explained in ragged_moe_triton.py.
"""

import torch
import triton
import triton.language as tl

LARGEST_FP8 = 448.0  # of float8_e4m3fn
_LARGEST_FP8 = tl.constexpr(LARGEST_FP8)
QUANTIZE_BLOCK = 1024

# Triton reads TRITON_INTERPRET when it decorates a kernel; only then do the kernels accept tensors in CPU memory.
INTERPRETED = triton.knobs.runtime.interpret
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def numbers(codes, dtype: tl.constexpr):
    """The numbers, exact in `dtype`. With 4 bits there are twice as many along the last axis."""
    if codes.dtype == tl.uint8:
        codes = tl.interleave((codes & 15).to(tl.int8) - 8, (codes >> 4).to(tl.int8) - 8)
    return codes.to(tl.float32 if _INTERPRETED else dtype)  # the interpreter takes integers for bits of bfloat16


@triton.jit
def dot(a, b, total):
    """total + a b, for numbers of one dtype; sums are float32."""
    if _INTERPRETED:  # the interpreter multiplies bfloat16 as if the bits were integers: triton issue 11584
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    if a.dtype == tl.float8e4nv:
        # Hopper's own sums of such products keep 14 bits; after so many terms they are added in float32.
        terms: tl.constexpr = 128 if a.shape[1] > 128 else a.shape[1]
        total = tl.dot(a, b, total, max_num_imprecise_acc=terms)
    else:
        total = tl.dot(a, b, total, input_precision="ieee")  # float32 is not cut to TF32
    return total


@triton.jit
def _to_fp8(value):
    """The nearest code of a float32 number that is not above LARGEST_FP8."""
    if _INTERPRETED:  # the interpreter cuts digits off, so it gets none that a code does not have
        exponent = tl.maximum((value.to(tl.int32, bitcast=True) >> 23) & 0xFF, 121)
        digit = ((exponent - 3) << 23).to(tl.float32, bitcast=True)
        value = (value / digit + 1.5 * 2**23 - 1.5 * 2**23) * digit
    return value.to(tl.float8e4nv)


@triton.jit
def _quantize_kernel(
    values, codes, scales, sorted_pairs, topk_ids, offsets, num_pairs, num_experts, columns, stride,
    ROUTED: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """codes[row] = values[row] / scales[row], whose largest number is LARGEST_FP8, in the row's columns: all of them,
    or with ROUTED the width of its expert, then zeros up to a multiple of VECTOR."""
    row = tl.program_id(0).to(tl.int64)
    end = columns
    if ROUTED:
        pair = tl.load(sorted_pairs + row)  # of rows that no tile has, this was never written
        expert = tl.load(topk_ids + pair, (pair >= 0) & (pair < num_pairs), -1)
        known = (expert >= 0) & (expert < num_experts)
        width = (tl.load(offsets + expert + 1, known, 0) - tl.load(offsets + expert, known, 0)).to(tl.int32)
        end = (width + VECTOR - 1) // VECTOR * VECTOR  # the numbers beyond the width are 0
    largest = 0.0
    for start in range(0, end, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(values + row * stride + column, column < end, 0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(value)))
    scale = tl.where(largest > 0, largest / _LARGEST_FP8, 1.0)
    tl.store(scales + row, scale)
    for start in range(0, end, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(values + row * stride + column, column < end, 0.0).to(tl.float32) / scale
        value = tl.clamp(value, -_LARGEST_FP8, _LARGEST_FP8, propagate_nan=tl.PropagateNan.ALL)
        tl.store(codes + row * stride + column, _to_fp8(value), column < end)


def quantize_rows(
    values: torch.Tensor, routing: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None, vector: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes in float8_e4m3fn and a scale for each row, the largest magnitude over 448, as dynamic schemes have them.

    Args:
        values: [rows, columns].
        routing: for rows of sorted pairs: sorted pairs, top-k ids and offsets. Only the columns of a row's expert are
            read, rounded up to a multiple of `vector`; other codes stay unwritten.

    Returns:
        Codes like `values`, and scales float32 [rows].
    """
    codes = torch.empty_like(values, dtype=torch.float8_e4m3fn)
    scales = torch.empty(len(values), dtype=torch.float32, device=values.device)
    sorted_pairs, topk_ids, offsets = routing or (scales, scales, scales)  # placeholders, never read
    _quantize_kernel[(len(values),)](
        values, codes, scales, sorted_pairs, topk_ids, offsets,
        topk_ids.numel(), len(offsets) - 1, values.shape[1], values.stride(0),
        ROUTED=routing is not None, BLOCK=QUANTIZE_BLOCK, VECTOR=vector,
    )  # fmt: skip
    return codes, scales
