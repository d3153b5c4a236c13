"""What each unit of a model costs in any measure of its geometry: parameters, bytes, bytes or operations of a step.

A measure is taken of the dense model with one more unit in a layer; the difference is what the unit costs. So every
measure and every family counts as pruned_vllm/formats does it, and grows with the units in a straight line, but for
what a sublayer has that goes with its last unit (its norms, some thousand numbers), which counts as staying.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache

import torch

from learner.model.units import Units, Values
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.layer import LayerGeometry

Measure = Callable[[ModelGeometry], float]


@dataclass(frozen=True)
class UnitCosts:
    """
    Attributes:
        fixed: what no unit costs: embeddings, norms, routers, shared experts, kinds that are not pruned.
        of_unit: by kind float64 [layers], of one unit; of heads without the KV head that several of them share.
        of_kv_head: float64 [layers that have heads], of that KV head: it goes with the last of its heads.
        heads_per_kv_head: units of the kind "head" that share one; 1 where each has its own, which then counts as its.
    """

    units: Units
    fixed: float
    of_unit: Mapping[str, torch.Tensor]
    of_kv_head: torch.Tensor
    heads_per_kv_head: int

    @classmethod
    def measured(cls, units: Units, geometry: ModelGeometry, measure: Measure) -> "UnitCosts":
        """Of a dense model; `measure` must be one that adds up over layers."""

        @cache
        def layer_cost(layer: LayerGeometry) -> float:
            return measure(geometry.with_layers((layer,)))

        heads_per_kv_head = max(
            (geometry.layers[index].widest_group // units.heads_per_unit for index in units.layers.get("head", ())),
            default=1,
        )
        of_unit: dict[str, list[float]] = {kind: [] for kind in units.layers}
        of_kv_head = []
        for kind, indices in units.layers.items():
            for index in indices:
                layer = geometry.layers[index]
                cost = layer_cost(_with_one_more(layer, kind, alone=heads_per_kv_head > 1)) - layer_cost(layer)
                of_unit[kind].append(cost)
                if kind == "head":
                    group = layer_cost(_with_one_more(layer, kind, alone=False)) - layer_cost(layer)
                    of_kv_head.append(group - heads_per_kv_head * cost)
        tensors = {kind: torch.tensor(costs, dtype=torch.float64) for kind, costs in of_unit.items()}
        costs = cls(units, 0.0, tensors, torch.tensor(of_kv_head, dtype=torch.float64), heads_per_kv_head)
        dense = {kind: torch.ones(units.shape(kind), dtype=torch.float64) for kind in units.layers}
        return replace(costs, fixed=measure(geometry) - costs.of_units(dense).item())

    def of_units(self, left: Values) -> torch.Tensor:
        """What units cost of which `left` [layers, units], in [0, 1], says how much is left; without dimensions,
        differentiable. A KV head is left as much as that of its heads which is left most."""
        total = sum((self._like(left[kind], costs) * left[kind]).sum() for kind, costs in self.of_unit.items())
        if "head" in left:
            groups = left["head"].unflatten(1, (-1, self.heads_per_kv_head)).amax(2)
            total = total + (self._like(groups, self.of_kv_head) * groups).sum()
        return torch.as_tensor(total)

    def of_row(self, kind: str, row: int, kept: torch.Tensor) -> float:
        """What the units of a row cost of which `kept`, bool, says which are left; all of a row of heads, or some."""
        cost = kept.sum() * self.of_unit[kind][row]
        if kind == "head":
            cost = cost + kept.view(-1, self.heads_per_kv_head).any(1).sum() * self.of_kv_head[row]
        return cost.item()

    def undecided(self, left: Values) -> torch.Tensor:
        """Sum of s (1 - s) of all units, each times its cost and its share of a KV head; differentiable."""
        terms, shared = {kind: s * (1 - s) for kind, s in left.items()}, self.shared()
        return torch.as_tensor(sum((self._like(term, shared[kind]) * term).sum() for kind, term in terms.items()))

    def shared(self) -> dict[str, torch.Tensor]:
        """By kind float64 [layers], what a unit costs together with its share of a KV head."""
        shared = dict(self.of_unit)
        if "head" in shared:
            shared["head"] = shared["head"] + self.of_kv_head / self.heads_per_kv_head
        return shared

    def of_kind(self, kind: str) -> float:
        """What all units of a kind cost."""
        return self.shared()[kind].sum().item() * self.units.widths[kind]

    def in_order(self, order: Values) -> Values:
        """By kind float64 [layers, units], what each unit adds when units come back from the largest `order` to the
        smallest: the first head of a KV head brings that along."""
        added = {kind: costs[:, None].expand(order[kind].shape).clone() for kind, costs in self.of_unit.items()}
        if "head" in order:
            groups = order["head"].unflatten(1, (-1, self.heads_per_kv_head))
            is_first = torch.nn.functional.one_hot(groups.argmax(2), self.heads_per_kv_head).flatten(1)
            added["head"] += is_first * self.of_kv_head[:, None]
        return added

    def beside(self, chosen: Values) -> Values:
        """By kind, bool [layers, units] as `chosen`: heads whose KV head a chosen head has brought along."""
        found = {kind: torch.zeros_like(of_kind) for kind, of_kind in chosen.items()}
        if "head" in found:
            groups = chosen["head"].unflatten(1, (-1, self.heads_per_kv_head)).any(2)
            found["head"] = groups.repeat_interleave(self.heads_per_kv_head, dim=1)
        return found

    @staticmethod
    def _like(values: torch.Tensor, costs: torch.Tensor) -> torch.Tensor:
        return costs.to(values)[:, None]


def _with_one_more(layer: LayerGeometry, kind: str, alone: bool) -> LayerGeometry:
    """A dense layer with one more channel, with a head more in its first group (`alone`), or with a group more."""
    if kind == "channel":
        return replace(layer, intermediate_size=layer.intermediate_size + 1)
    if kind == "expert":
        first, *others = layer.expert_intermediate_sizes
        return replace(layer, expert_intermediate_sizes=(first + 1, *others))
    first, *others = layer.query_heads_per_kv_head
    return replace(layer, query_heads_per_kv_head=(first + 1, *others) if alone else (first, first, *others))
