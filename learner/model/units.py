"""The prunable units of a model, as tensors [layers, units] by kind, and their way into a mask file."""

import math
from dataclasses import dataclass, replace

import torch

from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.masked import CHANNEL_MASK, EXPERT_MASK, HEAD_MASK

Values = dict[str, torch.Tensor]  # by kind: [layers that have the kind, units in such a layer]


@dataclass(frozen=True)
class Units:
    """What is pruned: heads, and channels of dense MLPs and of experts.

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
    def of(cls, geometry: ModelGeometry, tied: bool = False) -> "Units":
        """All units of a dense model. Raises InputError for a pruned one."""
        if not geometry.is_dense:
            raise InputError("the model is pruned already (config.json has per_layer_config); give the dense one")
        heads_per_unit = geometry.layers[0].widest_group if tied else 1
        sizes = {
            "head": [
                layer.num_attention_heads // heads_per_unit * geometry.family.can_lose_heads
                for layer in geometry.layers
            ],
            "channel": [layer.intermediate_size for layer in geometry.layers],
            "expert": [sum(layer.expert_intermediate_sizes) for layer in geometry.layers],
        }
        layers = {kind: tuple(index for index, size in enumerate(each) if size) for kind, each in sizes.items()}
        layers = {kind: indices for kind, indices in layers.items() if indices}
        return cls(
            layers=layers,
            widths={kind: max(sizes[kind]) for kind in layers},
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
        layers, widths = ({name: of[name] for name in of if name != kind} for of in (self.layers, self.widths))
        return replace(self, layers=layers, widths=widths)

    def num_groups(self, kind: str, budget: str) -> int:
        """Groups that meet a budget (one of BUDGETS) each by itself; `values.view(num_groups, -1)` is one a row."""
        if budget == "global":
            return 1
        return len(self.layers[kind]) * (self.num_experts if budget == kind == "expert" else 1)

    def kept(self, kind: str, sparsity: float, budget: str = "global") -> int:
        """Units that stay in each group at this sparsity: at least one."""
        return max(1, round(self.count(kind) // self.num_groups(kind, budget) * (1 - sparsity)))

    def to_masks(self, values: Values) -> dict[str, torch.Tensor]:
        """Values of all units as the masks of a mask file; differentiable."""
        masks = {}
        for kind, layers in self.layers.items():
            for index, units in zip(layers, values[kind], strict=True):
                if kind == "head":
                    masks[HEAD_MASK.format(index)] = units.repeat_interleave(self.heads_per_unit)
                elif kind == "channel":
                    masks[CHANNEL_MASK.format(index)] = units
                else:
                    masks[EXPERT_MASK.format(index)] = units.view(self.num_experts, -1)
        return masks


def sparsity(values: torch.Tensor) -> float:
    """Share of the units that are pruned: their value is zero or below."""
    return (values <= 0).double().mean().item()
