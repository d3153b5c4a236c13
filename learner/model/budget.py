"""What may be left of a model: shares of its units, or one cost that all kinds of units share.

Methods see a budget in three ways. While they learn, `constraints` say how far scores between 0 and 1 are above it.
When they decide, `support` chooses the units that stay from an order of all units. `keep` is the share that stays.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from learner.job import Job
from learner.model.costs import Measure, UnitCosts
from learner.model.units import Units, Values
from learner.targets import Target
from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.ideal import Case, ideal_cost


@dataclass(frozen=True)
class Constraint:
    """Groups of units that meet a budget each by itself.

    Attributes:
        keep: the share of each that may be left.
        num_groups: of these.
        left: [num_groups] of scores in [0, 1]: the share of each that is left; differentiable.
        undecided: [num_groups] of the same: how far they are from 0 and 1, mean of s (1 - s).
    """

    keep: float
    num_groups: int
    left: Callable[[Values], torch.Tensor]
    undecided: Callable[[Values], torch.Tensor]


class Budget(ABC):
    """Attributes: target: what was asked for; units: what may be pruned."""

    target: Target
    units: Units

    @abstractmethod
    def constraints(self, by: str = "global") -> dict[str, Constraint]:
        """By name, what the budget asks of all scores together. `by` (one of BUDGETS) says what meets it by itself."""

    @abstractmethod
    def support(self, order: Values, by: str = "global", within: Values | None = None) -> Values:
        """The units that stay, bool [layers, units] on the CPU: those of the largest `order`.

        Args:
            order: [layers, units] by kind.
            within: bool; units that may stay. What a smaller budget chooses within a larger one's is nested in it.
        """

    @abstractmethod
    def approached(self, share: float, before: "Budget | None") -> "Budget":
        """A budget that has gone this share of the way to this one, from the one before, or from the dense model."""

    def keep(self, by: str = "global") -> float:
        """The share that stays, mean over constraints."""
        constraints = self.constraints(by).values()
        return sum(constraint.keep for constraint in constraints) / len(constraints)


@dataclass(frozen=True)
class UnitBudget(Budget):
    """Of each kind of units a share goes; `sparsity` has it by kind."""

    target: Target
    units: Units
    sparsity: Mapping[str, float]

    def approached(self, share: float, before: Budget | None) -> "UnitBudget":
        assert before is None or isinstance(before, UnitBudget)
        start = dict.fromkeys(self.sparsity, 0.0) if before is None else before.sparsity
        return replace(
            self, sparsity={kind: start[kind] + share * (end - start[kind]) for kind, end in self.sparsity.items()}
        )

    def constraints(self, by: str = "global") -> dict[str, Constraint]:
        return {kind: self._constraint(kind, by) for kind in self.units.layers}

    def _constraint(self, kind: str, by: str) -> Constraint:
        groups = self.units.num_groups(kind, by)

        def undecided(scores: Values) -> torch.Tensor:
            s = scores[kind].view(groups, -1)
            return (s * (1 - s)).mean(1)

        kept = self.units.kept(kind, self.sparsity[kind], by)
        return Constraint(
            keep=kept * groups / self.units.count(kind),
            num_groups=groups,
            left=lambda scores: scores[kind].view(groups, -1).mean(1),
            undecided=undecided,
        )

    def support(self, order: Values, by: str = "global", within: Values | None = None) -> Values:
        found = {}
        for kind, values in _on_cpu(order, within).items():
            groups = values.view(self.units.num_groups(kind, by), -1)
            kept = self.units.kept(kind, self.sparsity[kind], by)
            chosen = groups.argsort(dim=1, descending=True, stable=True)[:, :kept]
            found[kind] = torch.zeros_like(groups, dtype=torch.bool).scatter(1, chosen, True).view_as(values)
        return found


@dataclass(frozen=True)
class CostBudget(Budget):
    """One cost for the whole model, in which all kinds of units compete.

    Attributes:
        geometry: of the dense model.
        measure: of a geometry, what counts.
        costs: what each unit costs in this measure.
        allowed: what the pruned model may cost.
    """

    target: Target
    units: Units
    geometry: ModelGeometry
    measure: Measure
    costs: UnitCosts
    allowed: float

    def constraints(self, by: str = "global") -> dict[str, Constraint]:
        assert by == "global", "Job has refused another one"
        total = self.measure(self.geometry) - self.costs.fixed
        return {
            "model": Constraint(
                keep=self.room / total,
                num_groups=1,
                left=lambda scores: self.costs.of_units(scores).view(1) / total,
                undecided=lambda scores: self.costs.undecided(scores).view(1) / total,
            )
        }

    def approached(self, share: float, before: Budget | None) -> "CostBudget":
        assert before is None or isinstance(before, CostBudget)
        start = self.measure(self.geometry) if before is None else before.allowed
        return replace(self, allowed=start + share * (self.allowed - start))

    @property
    def room(self) -> float:
        """What the units may cost together."""
        return self.allowed - self.costs.fixed

    def support(self, order: Values, by: str = "global", within: Values | None = None) -> Values:
        """As many of the largest as the cost allows. Where the next one is too large for what is left, others make up
        for the rest: heads of KV heads that stay and channels after it, in their order, or where these do not cost
        enough, it stays and the last channels before it go. So the cost is met to a channel, and what is chosen costs
        no more."""
        order = _on_cpu(order, within)
        added = self.costs.in_order(order)
        cost, ranks = _flat(added), _flat(order)
        fine = _flat({kind: torch.full_like(values, kind != "head") for kind, values in added.items()}).bool()
        places = ranks.argsort(descending=True, stable=True)
        places = places[ranks[places] > -torch.inf]
        number = int((cost[places].cumsum(0) <= self.room).sum())
        chosen = places[:number]
        cheap = fine | _flat(self.costs.beside(_by_kind(chosen, order)))
        for fills in (cheap, fine):
            chosen = _filled(chosen, places[~torch.isin(places, chosen)], cost, fills, self.room)
        if number < len(places) and not fine[places[number]]:
            whole = _made_fit(places[: number + 1], cost, fine, self.room)
            if cost[chosen].sum() < cost[whole].sum() <= self.room:
                chosen = whole
        return _by_kind(chosen, order)


def _filled(
    chosen: torch.Tensor, others: torch.Tensor, cost: torch.Tensor, fills: torch.Tensor, room: float
) -> torch.Tensor:
    """`chosen` and as many of the units among `others` that are `fills` as there is room for, in their order."""
    fill = others[fills[others]]
    return torch.cat((chosen, fill[cost[fill].cumsum(0) <= room - cost[chosen].sum()]))


def _made_fit(chosen: torch.Tensor, cost: torch.Tensor, fine: torch.Tensor, room: float) -> torch.Tensor:
    """`chosen` without as many of the last of its fine units as there is no room for."""
    last = chosen[fine[chosen]].flip(0)
    excess = cost[chosen].sum() - room
    gone = last[cost[last].cumsum(0) - cost[last] < excess]
    return chosen[~torch.isin(chosen, gone)]


def _flat(values: Values) -> torch.Tensor:
    return torch.cat([part.flatten() for part in values.values()])


def _by_kind(chosen: torch.Tensor, order: Values) -> Values:
    """Places in what `_flat` makes of `order`, as bool [layers, units] by kind."""
    sizes = [values.numel() for values in order.values()]
    flat = torch.zeros(sum(sizes), dtype=torch.bool).index_fill(0, chosen, True)
    return {kind: part.view_as(order[kind]) for kind, part in zip(order, flat.split(sizes), strict=True)}


def _on_cpu(order: Values, within: Values | None) -> Values:
    order = {kind: values.detach().double().cpu() for kind, values in order.items()}
    if within is None:
        return order
    return {kind: values.masked_fill(~within[kind].cpu(), -torch.inf) for kind, values in order.items()}


def make_budgets(job: Job, units: Units, geometry: ModelGeometry, element_bytes: int) -> tuple[Budget, ...]:
    """The budgets of a job, from the one that removes least to the one that removes most.

    Args:
        element_bytes: of a weight of the pruned model, and of its KV cache.

    Raises:
        InputError: the model is as small as a target already, or cannot be made so small.
    """
    budgets: list[Budget] = []
    for target in job.targets:
        if target.measure == "sparsity":
            heads = target.value if job.head_sparsity is None else job.head_sparsity
            shares = {kind: heads if kind == "head" else target.value for kind in units.layers}
            budgets.append(UnitBudget(target, units, shares))
        else:
            budgets.append(_cost_budget(target, job, units, geometry, element_bytes))
    return tuple(budgets)


def _cost_budget(target: Target, job: Job, units: Units, geometry: ModelGeometry, element_bytes: int) -> CostBudget:
    measure: Measure = {
        "parameters": lambda model: model.num_parameters,
        "bytes": lambda model: model.num_parameters * element_bytes,
        "speedup": lambda model: ideal_cost(model, Case.parse(job.at), element_bytes),
    }[target.measure]
    costs, dense = UnitCosts.measured(units, geometry, measure), measure(geometry)
    allowed = dense / target.value if target.measure == "speedup" else target.value
    option = f"--target-{target.measure} {target.name.removesuffix('x')}"
    if allowed >= dense:
        raise InputError(f"{option} is no less than the dense model has: {dense:,.0f} {target.measure}")
    if allowed <= costs.fixed:
        stays = f"{dense / costs.fixed:.3f} at {job.at}" if target.measure == "speedup" else f"{costs.fixed:,.0f}"
        raise InputError(
            f"{option} cannot be reached: what {job.method} may prune are the {', '.join(units.layers)} units, and "
            f"without any of them the model has {target.measure} {stays}; ask for less"
        )
    return CostBudget(target, units, geometry, measure, costs, allowed)
