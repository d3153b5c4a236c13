"""What a budget came to: the sizes that masks leave of a model, and the ideal speedup that they promise."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from learner.model.budget import Budget, UnitBudget
from learner.model.units import Values, sparsity
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.ideal import Case, ideal_speedup
from pruned_vllm.formats.layer import DEFAULT_ALIGNMENT, with_aligned_width
from pruned_vllm.formats.masked import kept_layer, layer_masks


@dataclass(frozen=True)
class Outcome:
    """
    Attributes:
        budget: what was asked for.
        dense, left: the model before, and as the masks leave it.
        values: by kind [layers, units]; 0 is pruned.
        at: the case of the ideal speedup.
        element_bytes: of a weight.
    """

    budget: Budget
    dense: ModelGeometry
    left: ModelGeometry
    values: Values
    at: str
    element_bytes: int

    def results(self) -> dict[str, float]:
        """Figures: shares of the units that went, sizes, and the ideal speedup as `convert-pruned inspect` counts it.
        padded_ideal_speedup is that of what convert-pruned writes by default, with padded FFN widths."""
        shares = {f"{kind}_sparsity": sparsity(values) for kind, values in self.values.items()}
        parameters = self.left.num_parameters
        return shares | {
            "parameters": parameters,
            "bytes": parameters * self.element_bytes,
            "ideal_speedup": self._speedup(self.left),
            "padded_ideal_speedup": self._speedup(self._padded()),
        }

    def as_json(self) -> dict[str, Any]:
        """For pruning.json: the target, what was achieved in its measure, and what it promises."""
        results, target = self.results(), self.budget.target
        achieved = {name: share for name, share in results.items() if name.endswith("_sparsity")}
        if not isinstance(self.budget, UnitBudget):
            achieved = {target.measure: results["ideal_speedup" if target.measure == "speedup" else target.measure]}
        kept = ("parameters", "bytes", "ideal_speedup", "padded_ideal_speedup")
        return {
            "target": {target.measure: target.value},
            "achieved": achieved,
            "at": self.at,
            **{name: results[name] for name in kept},
        }

    def _speedup(self, pruned: ModelGeometry) -> float:
        return ideal_speedup(self.dense, pruned, Case.parse(self.at), self.element_bytes)

    def _padded(self) -> ModelGeometry:
        layers = [
            with_aligned_width(layer, DEFAULT_ALIGNMENT, dense)
            for layer, dense in zip(self.left.layers, self.dense.layers, strict=True)
        ]
        return self.left.with_layers(tuple(layers))


def left_by(dense: ModelGeometry, masks: Mapping[str, torch.Tensor], drops_experts: bool) -> ModelGeometry:
    """What masks, under the keys of pruning_masks.safetensors, leave of a dense model.

    Args:
        drops_experts: experts without channels go with their rows of the router.
    """
    of_layers = layer_masks(masks, len(dense.layers))
    layers = [kept_layer(layer, of_layer) for layer, of_layer in zip(dense.layers, of_layers, strict=True)]
    if drops_experts:
        layers = [
            replace(layer, expert_intermediate_sizes=tuple(filter(None, layer.expert_intermediate_sizes)))
            for layer in layers
        ]
    return dense.with_layers(tuple(layers))
