"""The prunable units of a model, as tensors [layers, units] by kind, and their way into a mask file."""

from dataclasses import dataclass

import torch

from pruned_vllm.errors import InputError
from pruned_vllm.families import CHANNEL_MASK, HEAD_MASK
from pruned_vllm.geometry import ModelGeometry

Values = dict[str, torch.Tensor]  # "head" -> [layers, head units], "channel" -> [layers, intermediate_size]


@dataclass(frozen=True)
class Units:
    """What is pruned.

    Attributes:
        num_layers: layers of the model.
        widths: units in a layer by kind. A head unit is a query head, or a KV head with all its query heads.
        query_heads_per_unit: query heads that one head unit removes.
    """

    num_layers: int
    widths: dict[str, int]
    query_heads_per_unit: int

    @classmethod
    def of(cls, geometry: ModelGeometry, gqa: str = "tied") -> "Units":
        """Args: gqa: "tied" prunes KV heads with all their query heads, "independent" single query heads."""
        dense = geometry.dense
        if set(geometry.layers) != {dense}:
            raise InputError("the model is pruned already; masks are learned on a dense model")
        heads_per_unit = dense.query_heads_per_kv_head[0] if gqa == "tied" else 1
        widths = {"head": dense.num_attention_heads // heads_per_unit, "channel": dense.intermediate_size}
        return cls(len(geometry.layers), widths, heads_per_unit)

    def count(self, kind: str) -> int:
        """Units of this kind in the whole model."""
        return self.num_layers * self.widths[kind]

    def kept(self, kind: str, sparsity: float) -> int:
        """Units that stay at this sparsity, at least one."""
        return max(1, round(self.count(kind) * (1 - sparsity)))

    def to_masks(self, values: Values) -> dict[str, torch.Tensor]:
        """Values of all units as the masks of a mask file; differentiable."""
        heads = values["head"].repeat_interleave(self.query_heads_per_unit, dim=1)
        masks = {HEAD_MASK.format(index): heads[index] for index in range(self.num_layers)}
        return masks | {CHANNEL_MASK.format(index): values["channel"][index] for index in range(self.num_layers)}


def sparsity(values: torch.Tensor) -> float:
    """Share of the units that are pruned: their value is zero or below."""
    return (values <= 0).double().mean().item()
