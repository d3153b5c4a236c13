"""Baselines that learn nothing: the same share of every layer goes, by the norm of the weights or at random.

Where the budget is a cost, it is the same share of every kind, too: scores of heads and of channels do not compare.
"""

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch

from learner.methods.method import Learned, Task
from learner.model.budget import UnitBudget
from learner.model.expert_weights import expert_weights
from learner.model.projections import gate_up_weights, query_key_value_weights
from learner.model.units import Units, Values
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.progress import progress_bar


def magnitude(task: Task) -> Learned:
    """Keeps the units with the largest L2 norm over all weights that would go with them."""
    return keep_largest_in_each_layer(task, sums_over_weights(task, torch.square, "magnitude"))


def sums_over_weights(
    task: Task, importance: Callable[[torch.Tensor], torch.Tensor], title: str
) -> dict[str, torch.Tensor]:
    """By kind float32 [layers, units] on the CPU: the sum of `importance`, which is given weights and says how much
    each number counts, over all weights that would go with a unit.

    Query heads of a KV head that are not tied share its weights, so these favour none of them.
    """
    units, layers = task.units, task.model.model.layers

    def sums(count: int, *weights: torch.Tensor) -> torch.Tensor:
        """[count], over all `weights` [count * rows, columns] together."""
        return reduce(torch.add, (importance(weight.detach().float()).reshape(count, -1).sum(1) for weight in weights))

    def score_heads(layer: Any) -> torch.Tensor:
        attention = layer.self_attn
        query, key, value = query_key_value_weights(attention)
        query_heads = sums(units.widths["head"], query, attention.o_proj.weight.T)
        key_value_heads = attention.config.num_key_value_heads
        shared = sums(key_value_heads, key, value)
        return query_heads + shared.repeat_interleave(len(query_heads) // key_value_heads)

    def score_channels(layer: Any) -> torch.Tensor:
        mlp = layer.mlp
        return sums(units.widths["channel"], *gate_up_weights(mlp), mlp.down_proj.weight.T)

    def score_experts(layer: Any) -> torch.Tensor:
        return torch.cat([sums(len(gate), gate, up, down.T) for gate, up, down in expert_weights(layer.mlp.experts)])

    score = {"head": score_heads, "channel": score_channels, "expert": score_experts}
    scored: dict[str, list[torch.Tensor]] = {kind: [] for kind in units.layers}
    places = [(kind, index) for kind, indices in units.layers.items() for index in indices]
    show = task.accelerator.is_main_process
    for kind, index in progress_bar(places, desc=title, unit="layer", disable=not show):
        scored[kind].append(score[kind](layers[index]).cpu())
    return {kind: torch.stack(rows) for kind, rows in scored.items()}


def random(task: Task) -> Learned:
    """Keeps units at random."""
    generator = torch.Generator().manual_seed(task.seed)
    scores = {kind: torch.rand(task.units.shape(kind), generator=generator) for kind in task.units.layers}
    return keep_largest_in_each_layer(task, scores)


def keep_largest_in_each_layer(task: Task, scores: Values) -> Learned:
    """Masks for each budget: 1 for the units of the largest scores [layers, units] in their layer, 0 for the others.

    Raises InputError for scores that `check_finite` refuses.
    """
    check_finite(task.units, scores)
    order = {kind: _places_from_below(of_kind) for kind, of_kind in scores.items()}
    return keep_largest(task, order, by="layer" if isinstance(task.budget, UnitBudget) else "global")


def keep_largest(task: Task, scores: Values, by: str = "global") -> Learned:
    """Masks for each budget: 1 for the units of the largest scores [layers, units], 0 for the others.

    Args:
        by: what meets the budget by itself, one of BUDGETS.

    Raises:
        InputError: `check_finite` refuses the scores.
    """
    check_finite(task.units, scores)
    within, found = None, []
    for budget in task.budgets:
        within = budget.support(scores, by=by, within=within)
        found.append({kind: kept.float() for kind, kept in within.items()})
    return Learned.of_budgets(found)


def _places_from_below(scores: torch.Tensor) -> torch.Tensor:
    """Of scores [layers, units], the share of the layer's units that come before the middle of each: float64, between 0
    and 1. So a kind of few units loses neither more nor less than others by being counted in whole units."""
    places = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return 1 - (places.double() + 0.5) / scores.shape[1]


def check_finite(units: Units, scores: Values) -> None:
    """Raises InputError with every layer in which scores [layers, any] are NaN or infinite: they order nothing."""
    rows = [
        (index, kind, row)
        for kind, of_kind in scores.items()
        for index, row in zip(units.layers[kind], of_kind, strict=True)
    ]
    problems = [
        f"layer {index}: {count} of {len(row)} scores of the kind {kind} are NaN or infinite"
        for index, kind, row in sorted(rows, key=lambda place: place[0])
        if (count := int((~row.isfinite()).sum()))
    ]
    if problems:
        raise InputError(
            "Units cannot be told apart by what the model computes. Check the weights of the first of these layers, or "
            "use --dtype bfloat16 or float32:",
            problems,
        )
