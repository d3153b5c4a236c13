"""Mixture-of-experts feed-forward in Triton where every expert has its own width and nothing is padded to the widest.

Four launches, all on the device, their grids fixed by shapes alone, so that a CUDA graph can replay them with
any routing:

1. schedule: sorts the (token, choice) pairs by expert and cuts each expert's pairs into tiles of BLOCK_M rows
2. gate and up projection together, biases and activation in the epilogue, for a (tile, block of channels) each
3. down projection times the router's weight, for a (tile, block of hidden units) each
4. sum of a token's top-k results, in float32 and in the order of the choices: no atomics, the same bits every time.
   Biases of the down projection are added here, as experts without channels have one, too

Weights lie in rows: row r of `gate`, `up` and `down` belongs to channel r, experts one after the other. An expert of
odd width therefore shifts the next one by whole rows of `hidden` numbers and leaves every row as aligned as the first.

Quantized weights are codes with scales (`Scales` in ragged_moe_arguments.py). They become numbers like the input in the
tile, exactly, and sums are scaled: for decode, which takes as long as reading weights. Where that is asked for, large
batches quantize the input instead, and multiply codes: one more launch in front of each product.

The kernels' names for sizes: a pair is one (token, choice) with index token * topk + choice; a row is a place among the
pairs sorted by expert; `width` is an expert's number of channels, `hidden` the model's hidden size.
"""

import torch
import triton
import triton.language as tl

from pruned_vllm.kernels.ragged_moe_activations import activated
from pruned_vllm.kernels.ragged_moe_arguments import FP8_CAPABILITY, SILU, Activation, Biases, Scales, check_arguments
from pruned_vllm.kernels.ragged_moe_codes import INTERPRETED, dot, numbers, quantize_rows
from pruned_vllm.kernels.ragged_moe_config import QUANTIZED_INPUT_ABOVE, choose_config
from pruned_vllm.kernels.ragged_moe_reduce import sum_choices
from pruned_vllm.kernels.ragged_moe_schedule import locate, make_schedule, read_tile

# Rows of the intermediate start at multiples of this, and what the down projection reads of a row ends at one, with
# zeros behind the expert's width. With an end that Triton cannot prove to be a multiple of a vector, loads of 16-bit
# numbers fall to one number each, and they cannot be pipelined.
VECTOR = 16


@triton.jit
def _terms(step, count, GROUP_SIZE: tl.constexpr, BLOCK_K: tl.constexpr):
    """A step's first term of `count` that are summed, where its terms end, and its group. No step has two groups."""
    if GROUP_SIZE:
        steps: tl.constexpr = (GROUP_SIZE + BLOCK_K - 1) // BLOCK_K
        group = step // steps
        start = group * GROUP_SIZE + step % steps * BLOCK_K
        end = tl.minimum((group + 1) * GROUP_SIZE, count)
    else:
        group = 0
        start = step * BLOCK_K
        end = count
    return start, end, group


@triton.jit
def _num_steps(count, GROUP_SIZE: tl.constexpr, BLOCK_K: tl.constexpr):
    if GROUP_SIZE:
        steps = tl.cdiv(count, GROUP_SIZE) * ((GROUP_SIZE + BLOCK_K - 1) // BLOCK_K)
    else:
        steps = tl.cdiv(count, BLOCK_K)
    return steps


@triton.jit
def _add(rows, weight, total, scales_at, exists, GROUP_SIZE: tl.constexpr):
    """total + rows * weight, with groups times the scales [BLOCK_N] of the step's group."""
    if GROUP_SIZE:
        scale = tl.load(scales_at, exists, 0.0)
        total += dot(rows, weight, tl.zeros_like(total)) * scale[None, :]
    else:
        total = dot(rows, weight, total)
    return total


@triton.jit(do_not_specialize=["num_tiles", "num_blocks"])
def _gate_up_kernel(
    x, gate_up, intermediate, tiles, sorted_pairs, topk_ids, offsets, x_scales, scales, bias,
    num_tiles, num_blocks, num_experts, topk, hidden, row_size, up_offset, num_groups, up_scales_offset,
    intermediate_stride,
    ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr,
    SORTED: tl.constexpr, GROUP: tl.constexpr, GROUP_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """intermediate[row, :width] = activation(x[token] gate^T + bias[0], x[token] up^T + bias[1]), then zeros up to a
    multiple of VECTOR."""
    tile, block = locate(num_tiles, num_blocks, GROUP)
    expert, weight_row, width, row, pair, exists = read_tile(
        tile, tiles, sorted_pairs, topk_ids, offsets, num_experts, SORTED, BLOCK_M
    )
    # The grid holds a program for every block of the widest expert. Those beyond an expert's own width end here, after
    # a few loads: at batch 1 the whole grid is resident at once and they leave the bandwidth to the rest;
    # in large batches they cost, by estimate, 1 % of the time. A list of exactly the real blocks would need a longer
    # schedule in front of every layer, or programs that loop over it and drain their pipelines between two entries.
    if block * BLOCK_N >= width:
        return
    per_element: tl.constexpr = 2 if gate_up.dtype.element_ty == tl.uint8 else 1  # columns
    zero: tl.constexpr = 0x88 if per_element == 2 else 0.0
    channel = block * BLOCK_N + tl.arange(0, BLOCK_N)
    is_channel = channel < width
    k = tl.arange(0, BLOCK_K)
    element = tl.arange(0, BLOCK_K // per_element)
    x_at = x + (pair // topk)[:, None] * hidden + k[None, :]
    gate_at = gate_up + weight_row * row_size + channel[None, :] * row_size + element[:, None]
    scales_at = scales
    if scales is not None:
        scales_at += (weight_row + channel) * num_groups
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(0, _num_steps(hidden, GROUP_SIZE, BLOCK_K)):
        start, end, _ = _terms(step, hidden, GROUP_SIZE, BLOCK_K)
        rows = tl.load(x_at + start, exists[:, None] & (k < end - start)[None, :], 0.0)
        start, end, group = _terms(step, row_size, GROUP_SIZE // per_element, BLOCK_K // per_element)
        wanted = (element < end - start)[:, None] & is_channel[None, :]
        gate_weight = tl.load(gate_at + start, wanted, zero)
        up_weight = tl.load(gate_at + up_offset + start, wanted, zero)
        if scales is not None:
            gate_weight = tl.trans(numbers(tl.trans(gate_weight), rows.dtype))
            up_weight = tl.trans(numbers(tl.trans(up_weight), rows.dtype))
            gate = _add(rows, gate_weight, gate, scales_at + group, is_channel, GROUP_SIZE)
            up = _add(rows, up_weight, up, scales_at + up_scales_offset + group, is_channel, GROUP_SIZE)
        else:
            gate = dot(rows, gate_weight, gate)
            up = dot(rows, up_weight, up)
    if scales is not None and not GROUP_SIZE:
        gate *= tl.load(scales_at, is_channel, 0.0)[None, :]
        up *= tl.load(scales_at + up_scales_offset, is_channel, 0.0)[None, :]
    if x_scales is not None:
        scale = tl.load(x_scales + pair // topk, exists, 0.0)[:, None]
        gate *= scale
        up *= scale
    if bias is not None:
        bias_at = bias + weight_row + channel
        gate += tl.load(bias_at, is_channel, 0.0)[None, :]
        up += tl.load(bias_at + up_offset // row_size, is_channel, 0.0)[None, :]  # so many rows later
    # 0 beyond the width: weights and biases were read as 0 there.
    product = activated(gate, up, ACTIVATION, ALPHA, LIMIT)
    end = (width + VECTOR - 1) // VECTOR * VECTOR
    out_at = intermediate + row[:, None] * intermediate_stride + channel[None, :]
    tl.store(out_at, product.to(intermediate.dtype.element_ty), exists[:, None] & (channel < end)[None, :])


@triton.jit(do_not_specialize=["num_tiles", "num_blocks"])
def _down_kernel(
    intermediate, down, partial, topk_weights, tiles, sorted_pairs, topk_ids, offsets,
    intermediate_scales, scales, run_offsets,
    num_tiles, num_blocks, num_experts, hidden, row_size, intermediate_stride,
    SORTED: tl.constexpr, GROUP: tl.constexpr, GROUP_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """partial[pair] = topk_weights[pair] * (intermediate[row, :width] down). Pairs routed nowhere stay unwritten."""
    tile, block = locate(num_tiles, num_blocks, GROUP)
    expert, weight_row, width, row, pair, exists = read_tile(
        tile, tiles, sorted_pairs, topk_ids, offsets, num_experts, SORTED, BLOCK_M
    )
    if width <= 0:
        return
    per_element: tl.constexpr = 2 if down.dtype.element_ty == tl.uint8 else 1  # columns
    zero: tl.constexpr = 0x88 if per_element == 2 else 0.0
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = column < hidden
    element = block * (BLOCK_N // per_element) + tl.arange(0, BLOCK_N // per_element)
    k = tl.arange(0, BLOCK_K)
    rows_at = intermediate + row[:, None] * intermediate_stride + k[None, :]
    down_at = down + weight_row * row_size + k[:, None] * row_size + element[None, :]
    scales_at = scales
    if scales is not None:
        scales_at += tl.load(run_offsets + expert).to(tl.int64) * hidden + column
    last = (width + VECTOR - 1) // VECTOR * VECTOR
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(0, _num_steps(width, GROUP_SIZE, BLOCK_K)):
        start, end, group = _terms(step, width, GROUP_SIZE, BLOCK_K)
        rows = tl.load(rows_at + start, exists[:, None] & (k < last - start)[None, :], 0.0)
        wanted = (k < end - start)[:, None] & (element < row_size)[None, :]
        weight = tl.load(down_at + start * row_size, wanted, zero)
        if scales is not None:
            weight = numbers(weight, rows.dtype)
            total = _add(rows, weight, total, scales_at + group * hidden, is_column, GROUP_SIZE)
        else:
            total = dot(rows, weight, total)
    if scales is not None and not GROUP_SIZE:
        total *= tl.load(scales_at, is_column, 0.0)[None, :]
    if intermediate_scales is not None:
        total *= tl.load(intermediate_scales + row, exists, 0.0)[:, None]
    total *= tl.load(topk_weights + pair, exists, 0.0).to(tl.float32)[:, None]
    out_at = partial + pair[:, None] * hidden + column[None, :]
    tl.store(out_at, total.to(partial.dtype.element_ty), exists[:, None] & is_column[None, :])


def ragged_moe(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    offsets: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    max_width: int,
    scales: Scales | None = None,
    activation: Activation = SILU,
    biases: Biases | None = None,
) -> torch.Tensor:
    """The weighted sum of each token's experts, activation(x gate^T, x up^T) down, each at its own width.

    Accumulates in float32; what experts hand to their down projection and what they return are rounded to the dtype of
    `x`, as in vLLM's fused MoE. Reads nothing back to the host.

    Args:
        x: [tokens, hidden], float32, bfloat16 or float16.
        gate_up: [2, rows, hidden] like x, contiguous: all experts' gate rows, then all experts' up rows.
        down: [rows, hidden] like x, contiguous: row r is the direction in which channel r of `gate_up` is written
            (the transpose of down_proj.weight).
        offsets: [experts + 1] int32 or int64: expert e has rows offsets[e] to offsets[e + 1], any number, also none.
        topk_weights: [tokens, topk] floating point: the router's.
        topk_ids: [tokens, topk] int32 or int64; an id outside 0 to experts - 1 is routed nowhere and adds nothing.
        max_width: width of the widest expert. It sizes the grid and a workspace and must not be smaller than the
            widest one; that cannot be checked without waiting for the device.
        scales: of quantized weights; `gate_up` and `down` are codes then, see `Scales`.
        activation: what channels make of gate and up.
        biases: added to the projections, see `Biases`. An expert without channels adds its bias of down, too.

    Returns:
        [tokens, hidden], dtype of x.

    Raises:
        ValueError: shapes, dtypes, devices or layouts do not fit; the message lists everything that does not. Or the
            GPU has no float8_e4m3fn.
    """
    check_arguments(x, gate_up, down, offsets, topk_weights, topk_ids, max_width, scales, biases)
    _check_device(x, down)
    adds_nothing = max_width == 0 and (biases is None or biases.down is None)
    if topk_ids.numel() == 0 or len(offsets) == 1 or x.shape[1] == 0 or adds_nothing:
        return x.new_zeros(x.shape)
    x, topk_ids, topk_weights = x.contiguous(), topk_ids.contiguous(), topk_weights.contiguous()
    partial = x  # a placeholder, never read
    if max_width:
        partial = _compute_pairs(
            x, gate_up, down, offsets, topk_weights, topk_ids, max_width, scales, activation, biases
        )
    return sum_choices(partial, topk_ids, topk_weights, offsets, biases)


def _compute_pairs(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    offsets: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    max_width: int,
    scales: Scales | None,
    activation: Activation,
    biases: Biases | None,
) -> torch.Tensor:
    """What each (token, choice) gets from its expert's channels, times its router weight [pairs, hidden]. Pairs that
    are routed nowhere, or to an expert without channels, are not written."""
    hidden, num_pairs, num_experts = x.shape[1], topk_ids.numel(), len(offsets) - 1
    pairs_per_expert = num_pairs / num_experts
    quantize = (
        scales is not None
        and scales.quantize_input
        and down.dtype == torch.float8_e4m3fn
        and pairs_per_expert > QUANTIZED_INPUT_ABOVE
    )
    config = choose_config(pairs_per_expert, down.dtype if quantize else x.dtype)
    num_tiles, tiles, sorted_pairs = num_pairs, topk_ids, topk_ids  # placeholders, never read without a schedule
    if config.is_sorted:
        num_tiles, tiles, sorted_pairs = make_schedule(topk_ids, offsets, config.block_m)

    stride = triton.cdiv(max_width, VECTOR) * VECTOR
    intermediate = x.new_empty(num_pairs, stride)
    partial = x.new_empty(num_pairs, hidden)
    routing = (tiles, sorted_pairs, topk_ids, offsets)
    group_size = (scales and scales.group_size) or 0
    options = {
        "SORTED": config.is_sorted,
        "GROUP": config.group,
        "GROUP_SIZE": group_size,
        "BLOCK_M": config.block_m,
        "VECTOR": VECTOR,
    }
    inputs, input_scales = quantize_rows(x) if quantize else (x, None)
    blocks = triton.cdiv(max_width, config.gate_up.block_n)
    _gate_up_kernel[(num_tiles * blocks,)](
        inputs, gate_up, intermediate, *routing, input_scales, scales and scales.gate_up, biases and biases.gate_up,
        num_tiles, blocks, num_experts, topk_ids.shape[1], hidden, gate_up.stride(1), gate_up.stride(0),
        scales.gate_up.stride(1) if scales else 0, scales.gate_up.stride(0) if scales else 0, stride,
        ACTIVATION=activation.name, ALPHA=activation.alpha, LIMIT=activation.limit,
        **options, **config.gate_up.launch_options(group_size),
    )  # fmt: skip
    inputs, input_scales = intermediate, None
    if quantize:
        inputs, input_scales = quantize_rows(intermediate, (sorted_pairs, topk_ids, offsets), VECTOR)
    blocks = triton.cdiv(hidden, config.down.block_n)
    _down_kernel[(num_tiles * blocks,)](
        inputs, down, partial, topk_weights, *routing,
        input_scales, scales and scales.down, scales and scales.down_offsets,
        num_tiles, blocks, num_experts, hidden, down.stride(0), stride,
        **options, **config.down.launch_options(group_size),
    )  # fmt: skip
    return partial


def _check_device(x: torch.Tensor, weights: torch.Tensor) -> None:
    """Raises ValueError where the kernels do not run."""
    if INTERPRETED:
        return
    if x.device.type == "cpu":
        raise ValueError("ragged_moe got tensors in CPU memory, where Triton's kernels do not run")
    if (
        weights.dtype == torch.float8_e4m3fn
        and (capability := torch.cuda.get_device_capability(x.device)) < FP8_CAPABILITY
    ):
        raise ValueError(
            f"ragged_moe got float8_e4m3fn weights on a GPU of compute capability {capability[0]}.{capability[1]}; "
            f"it takes {FP8_CAPABILITY[0]}.{FP8_CAPABILITY[1]} to read them. Quantize the experts to 8-bit integers "
            "instead"
        )
