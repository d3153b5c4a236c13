"""Mixture-of-experts feed-forward in Triton where every expert has its own width and nothing is padded to the widest.

Four launches, all on the device, their grids fixed by shapes alone, so that a CUDA graph can replay them with
any routing:

1. schedule: sorts the (token, choice) pairs by expert and cuts each expert's pairs into tiles of BLOCK_M rows
2. gate and up projection together, silu(gate) * up in the epilogue, for a (tile, block of channels) each
3. down projection times the router's weight, for a (tile, block of hidden units) each
4. sum of a token's top-k results, in float32 and in the order of the choices: no atomics, the same bits every time

Weights lie in rows: row r of `gate`, `up` and `down` belongs to channel r, experts one after the other. An expert of
odd width therefore shifts the next one by whole rows of `hidden` numbers and leaves every row as aligned as the first.

The kernels' names for sizes: a pair is one (token, choice) with index token * topk + choice; a row is a place among the
pairs sorted by expert; `width` is an expert's number of channels, `hidden` the model's hidden size.
"""

import torch
import triton
import triton.language as tl

from pruned_vllm.kernels.ragged_moe_arguments import Scales, check_arguments
from pruned_vllm.kernels.ragged_moe_config import choose_config

# Rows of the intermediate start at multiples of this, and what the down projection reads of a row ends at one, with
# zeros behind the expert's width. With an end that Triton cannot prove to be a multiple of a vector, loads of 16-bit
# numbers fall to one number each, and they cannot be pipelined.
VECTOR = 16
REDUCE_BLOCK = 1024

# Triton reads TRITON_INTERPRET when it decorates a kernel; only then do the kernels accept tensors in CPU memory.
INTERPRETED = triton.knobs.runtime.interpret
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit(do_not_specialize=["num_pairs", "num_tiles"])
def _schedule_kernel(
    topk_ids, offsets, sorted_pairs, tiles, num_pairs, num_tiles, num_experts,
    BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """One program per expert: it places the expert's pairs and tiles behind those of all experts before it.

    Every program counts the pairs of all experts itself. That is a few loads from cache, where handing counts from one
    program to another would take a second launch, and at batch 1 launches are what this costs.
    """
    expert = tl.program_id(0)
    bins = tl.arange(0, BINS)  # at least one more than experts: the surplus counts what is routed nowhere
    is_expert = bins < num_experts
    width = tl.load(offsets + bins + 1, is_expert, 0) - tl.load(offsets + bins, is_expert, 0)
    counts = tl.zeros([BINS], tl.int32)
    for start in range(0, num_pairs, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        pair_expert = tl.load(topk_ids + pair, pair < num_pairs, -1)
        known = (pair_expert >= 0) & (pair_expert < num_experts)
        counts += tl.histogram(tl.where(known, pair_expert, num_experts).to(tl.int32), BINS)
    counts = tl.where(is_expert & (width > 0), counts, 0)  # an expert without channels adds nothing: no work for it
    tile_counts = (counts + BLOCK_M - 1) // BLOCK_M
    first_row = tl.sum(tl.where(bins < expert, counts, 0))
    first_tile = tl.sum(tl.where(bins < expert, tile_counts, 0))
    count = tl.sum(tl.where(bins == expert, counts, 0))

    for done in range(0, count, BLOCK_M):
        entry = tiles + (first_tile + done // BLOCK_M) * 3
        tl.store(entry, expert)
        tl.store(entry + 1, first_row + done)
        tl.store(entry + 2, tl.minimum(count - done, BLOCK_M))
    # The rest of the list says that there is no tile. Every expert's program writes a part of it.
    for tile in range(tl.sum(tile_counts) + expert, num_tiles, num_experts):
        tl.store(tiles + tile * 3, -1)

    row = first_row
    if count > 0:
        for start in range(0, num_pairs, BLOCK):
            pair = start + tl.arange(0, BLOCK)
            mine = tl.load(topk_ids + pair, pair < num_pairs, -1) == expert
            tl.store(sorted_pairs + row - 1 + tl.cumsum(mine.to(tl.int32), 0), pair, mine)
            row += tl.sum(mine.to(tl.int32))


@triton.jit
def _locate(num_tiles, num_blocks, GROUP: tl.constexpr):
    """This program's tile and block of columns. Programs that follow each other take GROUP tiles by one block of
    columns, then by the next: tiles of an expert share its weights in the L2 cache, blocks of a tile its input."""
    program = tl.program_id(0)
    first = program // (GROUP * num_blocks) * GROUP
    size = tl.minimum(num_tiles - first, GROUP)
    within = program - first * num_blocks
    return first + within % size, within // size


@triton.jit
def _read_tile(tile, tiles, sorted_pairs, topk_ids, offsets, num_experts, SORTED: tl.constexpr, BLOCK_M: tl.constexpr):
    """The tile's first weight row and width (0: nothing to do), and of its rows: places, pairs, and which there are.

    Without SORTED no schedule was built: tile i is pair i alone.
    """
    if SORTED:
        expert = tl.load(tiles + tile * 3)
        known = expert >= 0
        first_row = tl.load(tiles + tile * 3 + 1, known, 0)
        num_rows = tl.load(tiles + tile * 3 + 2, known, 0)
    else:
        expert = tl.load(topk_ids + tile)
        known = (expert >= 0) & (expert < num_experts)
        first_row = tile
        num_rows = 1
    weight_row = tl.load(offsets + expert, known, 0).to(tl.int64)
    width = (tl.load(offsets + expert + 1, known, 0) - weight_row).to(tl.int32)
    row = first_row + tl.arange(0, BLOCK_M)
    exists = tl.arange(0, BLOCK_M) < num_rows
    pair = tl.load(sorted_pairs + row, exists, 0) if SORTED else row
    return weight_row, width, row.to(tl.int64), pair.to(tl.int64), exists


@triton.jit
def _dot(a, b, total):
    if _INTERPRETED:  # the interpreter multiplies bfloat16 as if the bits were integers: triton issue 11584
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")  # float32 is not cut to TF32


@triton.jit(do_not_specialize=["num_tiles", "num_blocks"])
def _gate_up_kernel(
    x, gate_up, intermediate, tiles, sorted_pairs, topk_ids, offsets,
    num_tiles, num_blocks, num_experts, topk, hidden, up_offset, intermediate_stride,
    SORTED: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """intermediate[row, :width] = silu(x[token] gate^T) * (x[token] up^T), then zeros up to a multiple of VECTOR."""
    tile, block = _locate(num_tiles, num_blocks, GROUP)
    weight_row, width, row, pair, exists = _read_tile(
        tile, tiles, sorted_pairs, topk_ids, offsets, num_experts, SORTED, BLOCK_M
    )
    # The grid holds a program for every block of the widest expert. Those beyond an expert's own width end here, after
    # a few loads: at batch 1 the whole grid is resident at once and they leave the bandwidth to the rest;
    # in large batches they cost, by estimate, 1 % of the time. A list of exactly the real blocks would need a longer
    # schedule in front of every layer, or programs that loop over it and drain their pipelines between two entries.
    if block * BLOCK_N >= width:
        return
    channel = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_at = x + (pair // topk)[:, None] * hidden + k[None, :]
    gate_at = gate_up + weight_row * hidden + channel[None, :] * hidden + k[:, None]
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, hidden, BLOCK_K):
        inside = k < hidden - start
        rows = tl.load(x_at + start, exists[:, None] & inside[None, :], 0.0)
        wanted = inside[:, None] & (channel < width)[None, :]
        gate_weight = tl.load(gate_at + start, wanted, 0.0)
        up_weight = tl.load(gate_at + up_offset + start, wanted, 0.0)
        gate = _dot(rows, gate_weight, gate)
        up = _dot(rows, up_weight, up)
    product = gate / (1.0 + tl.exp(-gate)) * up  # 0 beyond the width: the weights were read as 0 there
    end = (width + VECTOR - 1) // VECTOR * VECTOR
    out_at = intermediate + row[:, None] * intermediate_stride + channel[None, :]
    tl.store(out_at, product.to(intermediate.dtype.element_ty), exists[:, None] & (channel < end)[None, :])


@triton.jit(do_not_specialize=["num_tiles"])
def _down_kernel(
    intermediate, down, partial, topk_weights, tiles, sorted_pairs, topk_ids, offsets,
    num_tiles, num_blocks, num_experts, hidden, intermediate_stride,
    SORTED: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """partial[pair] = topk_weights[pair] * (intermediate[row, :width] down). Pairs routed nowhere stay unwritten."""
    tile, block = _locate(num_tiles, num_blocks, GROUP)
    weight_row, width, row, pair, exists = _read_tile(
        tile, tiles, sorted_pairs, topk_ids, offsets, num_experts, SORTED, BLOCK_M
    )
    if width <= 0:
        return
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    rows_at = intermediate + row[:, None] * intermediate_stride + k[None, :]
    down_at = down + weight_row * hidden + k[:, None] * hidden + column[None, :]
    end = (width + VECTOR - 1) // VECTOR * VECTOR
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, width, BLOCK_K):
        rows = tl.load(rows_at + start, exists[:, None] & (k < end - start)[None, :], 0.0)
        wanted = (k < width - start)[:, None] & (column < hidden)[None, :]
        weight = tl.load(down_at + start * hidden, wanted, 0.0)
        total = _dot(rows, weight, total)
    total *= tl.load(topk_weights + pair, exists, 0.0).to(tl.float32)[:, None]
    out_at = partial + pair[:, None] * hidden + column[None, :]
    tl.store(out_at, total.to(partial.dtype.element_ty), exists[:, None] & (column < hidden)[None, :])


@triton.jit
def _reduce_kernel(partial, topk_ids, offsets, out, num_experts, hidden, TOPK: tl.constexpr, BLOCK: tl.constexpr):
    """out[token] = sum over the token's choices that were routed to an expert with channels."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(TOPK):
        pair = token * TOPK + choice
        expert = tl.load(topk_ids + pair)
        known = (expert >= 0) & (expert < num_experts)
        width = tl.load(offsets + expert + 1, known, 0) - tl.load(offsets + expert, known, 0)
        end = tl.where(width > 0, hidden, 0)  # the other pairs' partial results were never written
        total += tl.load(partial + pair * hidden + column, column < end, 0.0).to(tl.float32)
    tl.store(out + token * hidden + column, total.to(out.dtype.element_ty), column < hidden)


def ragged_moe(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    offsets: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    max_width: int,
    scales: Scales | None = None,
) -> torch.Tensor:
    """The weighted sum of each token's experts, (silu(x gate^T) * (x up^T)) down, each at its own width.

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
        scales: of quantized weights; not supported.

    Returns:
        [tokens, hidden], dtype of x.

    Raises:
        ValueError: shapes, dtypes, devices or layouts do not fit; the message lists everything that does not.
    """
    if scales is not None:
        raise ValueError("ragged_moe has no quantized weights on GPUs")
    check_arguments(x, gate_up, down, offsets, topk_weights, topk_ids, max_width)
    if x.device.type == "cpu" and not INTERPRETED:
        raise ValueError("ragged_moe got tensors in CPU memory, where Triton's kernels do not run")
    num_tokens, hidden = x.shape
    num_pairs, num_experts = topk_ids.numel(), len(offsets) - 1
    if num_pairs == 0 or num_experts == 0 or max_width == 0 or hidden == 0:
        return x.new_zeros(num_tokens, hidden)
    x, topk_ids, topk_weights = x.contiguous(), topk_ids.contiguous(), topk_weights.contiguous()
    config = choose_config(num_pairs / num_experts, x.dtype)
    num_tiles, tiles, sorted_pairs = num_pairs, topk_ids, topk_ids  # placeholders, never read without a schedule
    if config.is_sorted:
        num_tiles, tiles, sorted_pairs = _schedule(topk_ids, offsets, config.block_m)

    stride = triton.cdiv(max_width, VECTOR) * VECTOR
    intermediate = x.new_empty(num_pairs, stride)
    partial = x.new_empty(num_pairs, hidden)
    out = x.new_empty(num_tokens, hidden)
    routing = (tiles, sorted_pairs, topk_ids, offsets)
    options = {"SORTED": config.is_sorted, "GROUP": config.group, "BLOCK_M": config.block_m, "VECTOR": VECTOR}
    blocks = triton.cdiv(max_width, config.gate_up.block_n)
    _gate_up_kernel[(num_tiles * blocks,)](
        x, gate_up, intermediate, *routing,
        num_tiles, blocks, num_experts, topk_ids.shape[1], hidden, gate_up.stride(0), stride,
        **options, **config.gate_up.launch_options(),
    )  # fmt: skip
    blocks = triton.cdiv(hidden, config.down.block_n)
    _down_kernel[(num_tiles * blocks,)](
        intermediate, down, partial, topk_weights, *routing, num_tiles, blocks, num_experts, hidden, stride,
        **options, **config.down.launch_options(),
    )  # fmt: skip
    _reduce_kernel[(num_tokens, triton.cdiv(hidden, REDUCE_BLOCK))](
        partial, topk_ids, offsets, out, num_experts, hidden, TOPK=topk_ids.shape[1], BLOCK=REDUCE_BLOCK
    )
    return out


def _schedule(topk_ids: torch.Tensor, offsets: torch.Tensor, block_m: int) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Pairs sorted by expert, and tiles of them.

    Returns:
        The number of entries in the list of tiles, the most that any routing can need; the list, int32 [entries, 3] of
        (expert, first row, rows), -1 as the expert in entries that this routing does not need; the sorted pairs,
        int32 [pairs], without those that need no work: as many entries at the end stay unwritten.
    """
    num_pairs, num_experts = topk_ids.numel(), len(offsets) - 1
    # Worst case: as many experts as possible have a last tile with a single row in it.
    num_tiles = (num_pairs + min(num_pairs, num_experts) * (block_m - 1)) // block_m
    tiles = torch.empty(num_tiles, 3, dtype=torch.int32, device=topk_ids.device)
    sorted_pairs = torch.empty(num_pairs, dtype=torch.int32, device=topk_ids.device)
    block, num_warps = (512, 4) if num_pairs <= 512 else (4096, 8)  # two sizes, so that few variants get compiled
    _schedule_kernel[(num_experts,)](
        topk_ids, offsets, sorted_pairs, tiles, num_pairs, num_tiles, num_experts,
        BLOCK_M=block_m, BLOCK=block, BINS=triton.next_power_of_2(num_experts + 1), num_warps=num_warps,
    )  # fmt: skip
    return num_tiles, tiles, sorted_pairs
