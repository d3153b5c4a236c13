"""Which pairs of a ragged mixture of experts a program computes: the first launch of ragged_moe_triton.py, and how the
others read what it wrote. Names of sizes are explained there.
"""

import torch
import triton
import triton.language as tl


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
def locate(num_tiles, num_blocks, GROUP: tl.constexpr):
    """This program's tile and block of columns. Programs that follow each other take GROUP tiles by one block of
    columns, then by the next: tiles of an expert share its weights in the L2 cache, blocks of a tile its input."""
    program = tl.program_id(0)
    first = program // (GROUP * num_blocks) * GROUP
    size = tl.minimum(num_tiles - first, GROUP)
    within = program - first * num_blocks
    return first + within % size, within // size


@triton.jit
def read_tile(tile, tiles, sorted_pairs, topk_ids, offsets, num_experts, SORTED: tl.constexpr, BLOCK_M: tl.constexpr):
    """The tile's expert, first weight row and width (0: nothing to do; then there may be no such expert), and of its
    rows: places, pairs, and which there are.

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
    return expert, weight_row, width, row.to(tl.int64), pair.to(tl.int64), exists


def make_schedule(
    topk_ids: torch.Tensor, offsets: torch.Tensor, block_m: int
) -> tuple[int, torch.Tensor, torch.Tensor]:
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
