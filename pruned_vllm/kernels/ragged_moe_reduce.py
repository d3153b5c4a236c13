"""The last launch of ragged_moe_triton.py: the sum of what a token gets from its experts. Names of sizes are explained
there.
"""

import torch
import triton
import triton.language as tl

from pruned_vllm.kernels.ragged_moe_arguments import Biases

REDUCE_BLOCK = 1024


@triton.jit
def _reduce_kernel(
    partial, topk_ids, offsets, out, topk_weights, down_bias, num_experts, hidden,
    TOPK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[token] = sum over the token's choices that were routed to an expert: what it got from the expert's channels,
    if there are any, and topk_weights[pair] * down_bias[expert]."""
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
        if down_bias is not None:
            weight = tl.load(topk_weights + pair, known, 0.0).to(tl.float32)
            end = tl.where(known, hidden, 0)
            total += weight * tl.load(down_bias + expert.to(tl.int64) * hidden + column, column < end, 0.0)
    tl.store(out + token * hidden + column, total.to(out.dtype.element_ty), column < hidden)


def sum_choices(
    partial: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    offsets: torch.Tensor,
    biases: Biases | None,
) -> torch.Tensor:
    """Sums in float32 and in the order of the choices, so that the same input gives the same bits.

    Args:
        partial: [pairs, hidden], each times its router weight; not read for pairs without channels.

    Returns:
        [tokens, hidden], dtype of `partial`.
    """
    (num_tokens, topk), hidden = topk_ids.shape, partial.shape[1]
    out = partial.new_empty(num_tokens, hidden)
    down_bias = None if biases is None else biases.down
    _reduce_kernel[(num_tokens, triton.cdiv(hidden, REDUCE_BLOCK))](
        partial, topk_ids, offsets, out, None if down_bias is None else topk_weights, down_bias,
        len(offsets) - 1, hidden, TOPK=topk, BLOCK=REDUCE_BLOCK,
    )  # fmt: skip
    return out
