"""The prunable units of a model, as tensors [layers, units] by kind, and their way into a mask file."""

from dataclasses import dataclass

import torch

from pruned_vllm.errors import InputError
from pruned_vllm.geometry import ModelGeometry
from pruned_vllm.masked_checkpoint import CHANNEL_MASK, HEAD_MASK

Values = dict[str, torch.Tensor]  # "head" -> [layers, KV heads], "channel" -> [layers, intermediate_size]


@dataclass(frozen=True)
class Units:
    """What is pruned: KV heads, each with all query heads that read it, and FFN channels.

    Attributes:
        num_layers: layers of the model.
        widths: units in a layer by kind.
        query_heads_per_kv_head: query heads that go with a KV head.
    """

    num_layers: int
    widths: dict[str, int]
    query_heads_per_kv_head: int

    @classmethod
    def of(cls, geometry: ModelGeometry) -> "Units":
        if not geometry.is_dense:
            raise InputError("the model is pruned already (config.json has per_layer_config); give the dense one")
        dense = geometry.dense
        widths = {"head": dense.num_key_value_heads, "channel": dense.intermediate_size}
        return cls(len(geometry.layers), widths, dense.query_heads_per_kv_head[0])

    def count(self, kind: str) -> int:
        """Units of this kind in the whole model."""
        return self.num_layers * self.widths[kind]

    def kept(self, kind: str, sparsity: float) -> int:
        """Units that stay at this sparsity: at least one."""
        return max(1, round(self.count(kind) * (1 - sparsity)))

    def to_masks(self, values: Values) -> dict[str, torch.Tensor]:
        """Values of all units as the masks of a mask file; differentiable."""
        heads = values["head"].repeat_interleave(self.query_heads_per_kv_head, dim=1)
        masks = {HEAD_MASK.format(index): heads[index] for index in range(self.num_layers)}
        return masks | {CHANNEL_MASK.format(index): values["channel"][index] for index in range(self.num_layers)}


def sparsity(values: torch.Tensor) -> float:
    """Share of the units that are pruned: their value is zero or below."""
    return (values <= 0).double().mean().item()
