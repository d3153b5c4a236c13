"""The prunable units of a model, as tensors [layers, units] by kind, and their way into a mask file."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.masked import MASK_KEYS, layer_masks, mask_shapes

Values = dict[str, torch.Tensor]  # by kind: [layers that have the kind, units in such a layer]


@dataclass(frozen=True)
class Units:
    """What is pruned: heads, and channels of dense MLPs and of routed experts; shared experts stay.

    Heads are query heads, or, if tied, KV heads with all query heads that read them.

    Attributes:
        layers: by kind ("head", "channel", "expert") which layers have such units; a kind that none has is not named.
        widths: by kind, units in each of those layers: heads, FFN channels, channels of all routed experts.
        heads_per_unit: query heads in a unit of the kind "head".
        num_experts: routed experts in a layer that has any.
    """

    layers: dict[str, tuple[int, ...]]
    widths: dict[str, int]
    heads_per_unit: int
    num_experts: int

    @classmethod
    def from_geometry(cls, geometry: ModelGeometry, tied: bool = False) -> "Units":
        """All units of a dense model. Raises InputError for a pruned one."""
        if not geometry.is_dense:
            raise InputError("the model is pruned already (config.json has per_layer_config); give the dense one")
        heads_per_unit = max(layer.widest_group for layer in geometry.layers) if tied else 1
        shapes = layer_masks(mask_shapes(geometry), len(geometry.layers))
        layers = {
            kind: tuple(
                index
                for index, layer in enumerate(shapes)
                if getattr(layer, kind) is not None and not (kind == "channel" and layer.expert is not None)
            )
            for kind in MASK_KEYS
            if kind != "head" or geometry.family.can_lose_heads
        }
        layers = {kind: indices for kind, indices in layers.items() if indices}
        widths = {kind: math.prod(getattr(shapes[indices[0]], kind)) for kind, indices in layers.items()}
        if "head" in widths:
            widths["head"] //= heads_per_unit
        return cls(
            layers=layers,
            widths=widths,
            heads_per_unit=heads_per_unit,
            num_experts=geometry.experts.num_experts if geometry.experts else 0,
        )

    def shape(self, kind: str) -> tuple[int, int]:
        """[layers, units] of this kind's values."""
        return len(self.layers[kind]), self.widths[kind]

    def count(self, kind: str) -> int:
        """Units of this kind in the whole model."""
        return math.prod(self.shape(kind))

    def without(self, kind: str) -> "Units":
        """The same, but all units of this kind stay as they are: they have no values and no masks."""
        layers = {name: indices for name, indices in self.layers.items() if name != kind}
        return replace(self, layers=layers, widths={name: self.widths[name] for name in layers})

    def num_groups(self, kind: str, budget: str) -> int:
        """Groups that meet a budget (one of BUDGETS) each by itself; `values.view(num_groups, -1)` is one a row."""
        if budget == "global":
            return 1
        return len(self.layers[kind]) * (self.num_experts if budget == kind == "expert" else 1)

    def kept(self, kind: str, sparsity: float, budget: str = "global") -> int:
        """Units that stay in each group at this sparsity: at least one."""
        return max(1, round(self.count(kind) // self.num_groups(kind, budget) * (1 - sparsity)))

    def to_masks(self, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Values of all units as the masks of a mask file; differentiable."""
        masks = {}
        for kind, layers in self.layers.items():
            for index, units in zip(layers, values[kind], strict=True):
                if kind == "head":
                    units = units.repeat_interleave(self.heads_per_unit)
                elif kind == "expert":
                    units = units.view(self.num_experts, -1)
                masks[MASK_KEYS[kind].format(index)] = units
        return masks


def sparsity(values: torch.Tensor) -> float:
    """Share of the units that are pruned: their value is zero or below."""
    return (values <= 0).double().mean().item()
