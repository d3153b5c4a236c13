"""Turns the masks of a layer into cuts of its tensors: which rows and columns stay, and what they are multiplied by.

Why the folds are exact, with m the mask, for every finite m:
- head mask on the attention output of head h: m_h (P_h X W_V^h) W_O^h. Where a KV head serves one query head, m_h goes
  into its rows of W_V and b_V; where it serves several, only W_O's columns belong to one query head alone.
- channel mask on the product, m_j (act(gate_j) * up_j): goes into row j of W_up and b_up (DDP, paper section 3.1).
- channel mask on both projections before the activation, act(m_j gate_j) * (m_j up_j): goes into both rows.
"""

from dataclasses import dataclass

import torch

from converter.masks import LayerMasks
from pruned_vllm.geometry import LayerGeometry


@dataclass(frozen=True)
class Cut:
    """What happens to one tensor; None keeps all, or multiplies by nothing.

    Attributes:
        rows, columns: indices that stay, ascending.
        row_factors, column_factors: float32, one for each index that stays.
    """

    rows: torch.Tensor | None = None
    row_factors: torch.Tensor | None = None
    columns: torch.Tensor | None = None
    column_factors: torch.Tensor | None = None

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """Cuts, multiplies in float32 (float64 for float64) and casts once to the dtype the tensor had."""
        result = tensor
        if self.rows is not None:
            result = result.index_select(0, self.rows)
        if self.columns is not None:
            result = result.index_select(1, self.columns)
        if self.row_factors is None and self.column_factors is None:
            return result.contiguous()
        result = result.to(torch.promote_types(tensor.dtype, torch.float32))
        if self.row_factors is not None:
            result = result * self.row_factors.view(-1, *[1] * (tensor.dim() - 1))
        if self.column_factors is not None:
            result = result * self.column_factors
        return result.to(tensor.dtype).contiguous()


def cut_layer(
    dense: LayerGeometry, head_dim: int, masks: LayerMasks, channel_mask_site: str
) -> tuple[LayerGeometry, dict[str, Cut]]:
    """The geometry that a layer's masks leave, and the cut of each of its tensors.

    Args:
        dense: the layer before pruning, its query groups even.
        channel_mask_site: "product" or "gate_and_up".

    Returns:
        the pruned layer; cuts by tensor name without the "model.layers.{i}." prefix. Tensors that are not named
        (norms, down_proj.bias, o_proj.bias) stay as they are.
    """
    cuts: dict[str, Cut] = {}
    groups, width = dense.query_heads_per_kv_head, dense.intermediate_size

    def linear(name: str, cut: Cut) -> None:
        cuts[f"{name}.weight"] = cut
        cuts[f"{name}.bias"] = Cut(rows=cut.rows, row_factors=cut.row_factors)

    if masks.head is not None:
        kept = masks.head.view(len(groups), groups[0]) != 0
        groups = tuple(int(count) for count in kept.sum(1) if count)
        query_heads = kept.view(-1).nonzero().view(-1)
        kv_heads = kept.any(1).nonzero().view(-1)
        query_rows, kv_rows = _head_rows(query_heads, head_dim), _head_rows(kv_heads, head_dim)
        factors = masks.head[query_heads].repeat_interleave(head_dim)
        one_query_head = dense.num_attention_heads == dense.num_key_value_heads
        linear("self_attn.q_proj", Cut(rows=query_rows))
        linear("self_attn.k_proj", Cut(rows=kv_rows))
        linear("self_attn.v_proj", Cut(rows=kv_rows, row_factors=factors if one_query_head else None))
        cuts["self_attn.o_proj.weight"] = Cut(columns=query_rows, column_factors=None if one_query_head else factors)
    if masks.channel is not None:
        channels = masks.channel.nonzero().view(-1)
        factors, width = masks.channel[channels], len(channels)
        linear("mlp.up_proj", Cut(rows=channels, row_factors=factors))
        linear("mlp.gate_proj", Cut(rows=channels, row_factors=factors if channel_mask_site == "gate_and_up" else None))
        cuts["mlp.down_proj.weight"] = Cut(columns=channels)
    return LayerGeometry(groups, width), cuts


def _head_rows(heads: torch.Tensor, head_dim: int) -> torch.Tensor:
    return (heads[:, None] * head_dim + torch.arange(head_dim)).view(-1)
