"""Turns the masks of a layer into cuts of its tensors: which rows and columns stay, and what they are multiplied by.

Why the folds are exact, with m the mask, for every finite m:
- head mask on the attention output of head h: m_h (P_h X W_V^h) W_O^h. Where a KV head serves one query head, m_h goes
  into its rows of W_V and b_V; where it serves several, only W_O's columns belong to one query head alone. A gate of
  the output multiplies the same numbers, before or after; its rows of W_Q go with the head.
- channel mask on the product, m_j (act(gate_j) * up_j): goes into row j of W_up and b_up (DDP, paper section 3.1).
- channel mask on both projections before the activation, act(m_j gate_j) * (m_j up_j): goes into both rows.
- expert masks are channel masks of each routed expert. The router and the MLP that all tokens share stay as they are.
  Where up is clamped before it is multiplied (gpt-oss), a mask on the product goes into column j of W_down, and what
  multiplies both projections is no factor of any weight: `pruned_vllm.formats.masked.site_problems`.

Padding is exact too: a padded KV head has zero values, a padded query head or channel zero columns in W_O or W_down.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from pruned_vllm.common.padding import PAD, head_rows, take_or_zero
from pruned_vllm.formats.layer import LayerGeometry
from pruned_vllm.formats.masked import LayerMasks
from pruned_vllm.formats.sizes import ModelSizes


@dataclass(frozen=True)
class Cut:
    """What happens to one tensor; None keeps all, or multiplies by nothing. `blocks.Folding` does it to stored ones.

    Attributes:
        rows, columns: what the result consists of, as indices; PAD for zeros.
        row_factors, column_factors: float32, one for each index.
    """

    rows: torch.Tensor | None = None
    row_factors: torch.Tensor | None = None
    columns: torch.Tensor | None = None
    column_factors: torch.Tensor | None = None

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """Cuts, multiplies in float32 (float64 for float64) and casts once to the dtype the tensor had."""
        result = tensor
        if self.rows is not None:
            result = take_or_zero(result, 0, self.rows)
        if self.columns is not None:
            result = take_or_zero(result, 1, self.columns)
        if self.row_factors is None and self.column_factors is None:
            return result.contiguous()
        result = result.to(torch.promote_types(tensor.dtype, torch.float32))
        if self.row_factors is not None:
            result = result * self.row_factors.view(-1, *[1] * (tensor.dim() - 1))
        if self.column_factors is not None:
            result = result * self.column_factors
        return result.to(tensor.dtype).contiguous()


def kept_layer(layer: LayerGeometry, masks: LayerMasks) -> LayerGeometry:
    """The geometry that masks leave of a layer."""
    groups, width, experts = layer.query_heads_per_kv_head, layer.intermediate_size, layer.expert_intermediate_sizes
    if masks.head is not None:
        groups = tuple(len(heads) for heads in _kept_query_heads(layer, masks.head).values())
    if masks.channel is not None:
        width = int(masks.channel.count_nonzero())
    if masks.expert is not None:
        experts = tuple(masks.expert.count_nonzero(dim=1).tolist())
    return replace(layer, query_heads_per_kv_head=groups, intermediate_size=width, expert_intermediate_sizes=experts)


def cut_layer(
    model: ModelSizes,
    layer: LayerGeometry,
    masks: LayerMasks,
    channel_mask_site: str,
    target: LayerGeometry,
) -> dict[str, Cut]:
    """The cut of each of a layer's tensors that makes it into `target`.

    Args:
        layer: the sizes that its tensors have.
        channel_mask_site: "product" or "gate_and_up".
        target: a shape that `kept_layer` fits into (see `converter.shapes.fits`); what it has more is padding.

    Returns:
        cuts by tensor name without the "model.layers.{i}." prefix. Tensors that are not named (norms, down_proj.bias,
        o_proj.bias, the router) stay as they are, those of a skipped sublayer or an expert without channels vanish.
    """
    cuts: dict[str, Cut] = {}
    masks = _with_masks_to_pad(layer, masks, target)

    def linear(name: str, cut: Cut) -> None:
        cuts[f"{name}.weight"] = cut
        cuts[f"{name}.bias"] = Cut(rows=cut.rows, row_factors=cut.row_factors)

    if masks.head is not None and model.latent is not None:  # all heads are there, or none
        factors = _factors(masks.head, torch.arange(len(masks.head)))
        if factors is not None and target.query_heads_per_kv_head:
            cuts["self_attn.o_proj.weight"] = Cut(column_factors=factors.repeat_interleave(model.latent.v_head_dim))
    elif masks.head is not None:
        head_dim = model.head_dim
        kv_heads, query_heads = _place_heads(_kept_query_heads(layer, masks.head), target)
        query_rows, kv_rows = head_rows(query_heads, head_dim), head_rows(kv_heads, head_dim)
        factors = _factors(masks.head, torch.tensor(query_heads, dtype=torch.long))
        factors = None if factors is None else factors.repeat_interleave(head_dim)
        into_v_proj = set(layer.query_heads_per_kv_head) == {1}
        linear("self_attn.q_proj", Cut(rows=head_rows(query_heads, model.family.query_rows(head_dim))))
        linear("self_attn.k_proj", Cut(rows=kv_rows))
        linear("self_attn.v_proj", Cut(rows=kv_rows, row_factors=factors if into_v_proj else None))
        cuts["self_attn.o_proj.weight"] = Cut(columns=query_rows, column_factors=None if into_v_proj else factors)
        cuts["self_attn.sinks"] = Cut(rows=torch.tensor(query_heads, dtype=torch.long))
    if masks.channel is not None:
        gate, up, down = cut_mlp(masks.channel, channel_mask_site, target.intermediate_size)
        mlp = model.family.mlp_of(layer)
        linear(f"{mlp}.gate_proj", gate)
        linear(f"{mlp}.up_proj", up)
        cuts[f"{mlp}.down_proj.weight"] = down
    for expert, mask in enumerate(_expert_masks(layer, masks, target)):
        modules = model.family.experts_format.modules_of(expert)
        site = channel_mask_site if model.family.experts_format.is_linear_in_up else "down"
        gate, up, down = cut_mlp(mask, site, target.expert_intermediate_sizes[expert])
        linear(modules[0], gate)
        linear(modules[1], up)
        cuts[f"{modules[2]}.weight"] = down
    return cuts


def _expert_masks(
    layer: LayerGeometry, masks: LayerMasks[torch.Tensor], target: LayerGeometry
) -> Sequence[torch.Tensor]:
    """The mask of each expert, ones where there is no mask, but padding; none where nothing changes."""
    if masks.expert is not None:
        return list(masks.expert)
    if target.expert_intermediate_sizes == layer.expert_intermediate_sizes:
        return []
    return [torch.ones(width) for width in layer.expert_intermediate_sizes]


def cut_mlp(channel_mask: torch.Tensor, channel_mask_site: str, width: int) -> tuple[Cut, Cut, Cut]:
    """The cuts of the gate, up and down projection that leave `width` channels: those of the mask, and padding.

    Args:
        channel_mask_site: "product", "gate_and_up", or "down" for a product whose factors go into W_down.
    """
    kept = channel_mask.nonzero().view(-1)
    channels = torch.cat((kept, torch.full((width - len(kept),), PAD)))
    factors = _factors(channel_mask, channels)
    gate = Cut(rows=channels, row_factors=factors if channel_mask_site == "gate_and_up" else None)
    if channel_mask_site == "down":
        return gate, Cut(rows=channels), Cut(columns=channels, column_factors=factors)
    return gate, Cut(rows=channels, row_factors=factors), Cut(columns=channels)


def _with_masks_to_pad(layer: LayerGeometry, masks: LayerMasks, target: LayerGeometry) -> LayerMasks:
    """`masks` with ones where there is no mask, but padding: a mask that keeps all says where what is there goes."""
    head, channel = masks.head, masks.channel
    if head is None and target.query_heads_per_kv_head != layer.query_heads_per_kv_head:
        head = torch.ones(layer.num_attention_heads)
    if channel is None and target.intermediate_size != layer.intermediate_size:
        channel = torch.ones(layer.intermediate_size)
    return LayerMasks(head, channel, masks.expert)


def _kept_query_heads(layer: LayerGeometry, head_mask: torch.Tensor) -> dict[int, list[int]]:
    """The query heads that stay, by the KV head they read; a KV head without any is gone."""
    kv_head_of = [kv_head for kv_head, group in enumerate(layer.query_heads_per_kv_head) for _ in range(group)]
    kept: dict[int, list[int]] = {}
    for head in head_mask.nonzero().view(-1).tolist():
        kept.setdefault(kv_head_of[head], []).append(head)
    return kept


def _place_heads(kept: dict[int, list[int]], target: LayerGeometry) -> tuple[list[int], list[int]]:
    """Which KV head and which query heads go to each place of `target`, PAD where none is left."""
    groups = target.query_heads_per_kv_head
    places, kv_heads = list(range(len(groups))), list(kept)
    if not target.has_even_groups:
        # Uneven groups may come in another order than the masks left them in; sorting pairs equal sizes.
        places.sort(key=lambda place: groups[place])
        kv_heads.sort(key=lambda kv_head: len(kept[kv_head]))
    placed = dict(zip(places, kv_heads, strict=False))  # where there are more places than heads, the rest is padding
    query_heads = []
    for place, group in enumerate(groups):
        heads = kept.get(placed.get(place, PAD), [])
        query_heads += heads + [PAD] * (group - len(heads))
    return [placed.get(place, PAD) for place in range(len(groups))], query_heads


def _factors(mask: torch.Tensor, index: torch.Tensor) -> torch.Tensor | None:
    """The mask at `index`; 1 for padding, whose zeros stay zeros. None where all are 1, and nothing is multiplied."""
    factors = torch.where(index == PAD, 1, mask[index.clamp(min=0)])
    return None if bool((factors == 1).all()) else factors
