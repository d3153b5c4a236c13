"""Baselines that learn nothing: the same share of every layer goes, by the norm of the weights or at random."""

from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch

from learner.methods.method import Learned, Task
from learner.model.expert_weights import expert_weights
from learner.model.projections import gate_up_weights, query_key_value_weights
from learner.model.units import Units
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.progress import progress_bar


def magnitude(task: Task) -> Learned:
    """Keeps the units with the largest L2 norm over all weights that would go with them.

    Query heads of a KV head that are not tied share its weights, so these favour none of them.
    """
    units, layers = task.units, task.model.model.layers

    def squares(count: int, *weights: torch.Tensor) -> torch.Tensor:
        """[count], of all `weights` [count * rows, columns] together."""
        return reduce(torch.add, (weight.detach().float().square().reshape(count, -1).sum(1) for weight in weights))

    def score_heads(layer: Any) -> torch.Tensor:
        attention = layer.self_attn
        query, key, value = query_key_value_weights(attention)
        query_heads = squares(units.widths["head"], query, attention.o_proj.weight.T)
        key_value_heads = attention.config.num_key_value_heads
        shared = squares(key_value_heads, key, value)
        return query_heads + shared.repeat_interleave(len(query_heads) // key_value_heads)

    def score_channels(layer: Any) -> torch.Tensor:
        mlp = layer.mlp
        return squares(units.widths["channel"], *gate_up_weights(mlp), mlp.down_proj.weight.T)

    def score_experts(layer: Any) -> torch.Tensor:
        return torch.cat([squares(len(gate), gate, up, down.T) for gate, up, down in expert_weights(layer.mlp.experts)])

    score = {"head": score_heads, "channel": score_channels, "expert": score_experts}
    scored: dict[str, list[torch.Tensor]] = {kind: [] for kind in units.layers}
    places = [(kind, index) for kind, indices in units.layers.items() for index in indices]
    show = task.accelerator.is_main_process
    for kind, index in progress_bar(places, desc="magnitude", unit="layer", disable=not show):
        scored[kind].append(score[kind](layers[index]))
    stacked = {kind: torch.stack(rows).cpu() for kind, rows in scored.items()}
    return Learned(keep_largest_in_each_layer(task, stacked))


def random(task: Task) -> Learned:
    """Keeps units at random."""
    generator = torch.Generator().manual_seed(task.seed)
    scores = {kind: torch.rand(task.units.shape(kind), generator=generator) for kind in task.units.layers}
    return Learned(keep_largest_in_each_layer(task, scores))


def keep_largest_in_each_layer(task: Task, scores: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By kind, 1 for the units [layers, units] of the largest scores in their layer, and 0 for the others.

    At least one stays. Raises InputError for scores that `check_finite` refuses.
    """
    check_finite(task.units, scores)
    values = {}
    for kind, of_kind in scores.items():
        kept = max(1, round(of_kind.shape[1] * (1 - task.target_sparsity[kind])))
        values[kind] = torch.zeros_like(of_kind).scatter(1, of_kind.topk(kept, dim=1).indices, 1)
    return values


def check_finite(units: Units, scores: Mapping[str, torch.Tensor]) -> None:
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
