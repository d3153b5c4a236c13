"""REAP, Router-weighted Expert Activation Pruning (arXiv 2510.13999): a baseline that removes whole experts.

An expert is scored by what it adds where it is used: the mean, over the tokens that the router sends to it, of the
weight that the router gives it times the L2 norm of its output,

    S_j = mean over tokens x with j among the chosen of  g_j(x) ||f_j(x)||

with g_j as the model applies it, so divided by the sum of the chosen where the model does that. An expert that no token
is sent to has 0. The experts with the smallest scores go: the same number in every layer, as in REAP, or with
--budget global those with the smallest scores of the whole model. No layer keeps fewer than its router chooses.
Heads, dense MLPs and shared experts stay. Where the budget is a cost, it is met to an expert.

    learn-masks MODEL ckpt/ --method reap --sparsity 0.5 --data text/*.txt
    convert-pruned ckpt/ out/ --drop-empty-experts

The masks of a removed expert are all 0. It is REAP only where its row of the router goes too, as convert-pruned does it
with --drop-empty-experts; the perplexity that learn-masks measures is that of such routers.
"""

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from learner.methods.baselines import check_finite
from learner.methods.gates import largest
from learner.methods.method import Learned, Task
from learner.model.budget import CostBudget, UnitBudget
from learner.model.expert_weights import output_of, routed_products
from pruned_vllm.common.errors import InputError


def learn(task: Task) -> Learned:
    """Masks of 0 and 1, the same for all channels of an expert; see learner/methods/method.py."""
    chosen, found = task.model.config.num_experts_per_tok, scores(task)
    check_finite(task.units, {"expert": found})
    width = task.units.widths["expert"] // task.units.num_experts
    kept = []
    for budget in task.budgets:
        if isinstance(budget, UnitBudget):
            experts = kept_experts(found, budget.sparsity["expert"], task.settings.budget, chosen)
        else:
            assert isinstance(budget, CostBudget)
            experts = _within_cost(found, budget, task, chosen)
        kept.append({"expert": experts.float().repeat_interleave(width, dim=1)})
    return Learned.of_budgets(kept)


@torch.no_grad()
def scores(task: Task) -> torch.Tensor:
    """Scores float32 [layers, experts] on the CPU. Layers see the text as the dense model does."""
    units, accelerator, layers = task.units, task.accelerator, task.model.model.layers
    with _sums([layers[index].mlp.experts for index in units.layers["expert"]], units.num_experts) as sums:
        for tokens in task.calibration("reap"):
            task.model.model(input_ids=tokens, use_cache=False)
    totals, counts = accelerator.reduce(torch.stack(sums).to(accelerator.device)).unbind(1)
    return (totals / counts.clamp(min=1)).float().cpu()


def kept_experts(scores: torch.Tensor, sparsity: float, budget: str, least: int) -> torch.Tensor:
    """Which experts stay, bool [layers, experts].

    Args:
        scores: [layers, experts].
        sparsity: share of the experts that goes, of each layer or of all layers together.
        budget: "layer" or "global".
        least: experts that stay in each layer, whatever their scores.

    Raises:
        InputError: the share leaves fewer experts than `least` in a layer.
    """
    groups = scores.view(1, -1) if budget == "global" else scores
    number = round(groups.shape[1] * (1 - sparsity))
    needed = least * len(scores) // len(groups)
    if number < needed:
        where = "the model" if budget == "global" else "each layer"
        raise InputError(
            f"--sparsity {sparsity:g} leaves {number} of {groups.shape[1]} experts in {where}, but the routers choose "
            f"{least} in each of {len(scores)} layers (num_experts_per_tok), so {needed} must stay; remove fewer"
        )
    protected = torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.topk(least, dim=1).indices, True)
    return largest(scores.masked_fill(protected, torch.inf).view_as(groups), number).view_as(scores)


def _within_cost(scores: torch.Tensor, budget: CostBudget, task: Task, least: int) -> torch.Tensor:
    """Which experts stay, bool [layers, experts]: as many as a cost allows, counted without their rows of the router.

    Raises:
        InputError: the cost is not even met where each layer keeps `least`.
    """
    indices, count = task.units.layers["expert"], scores.shape[1]

    def cost(kept: torch.Tensor) -> float:
        layers = list(budget.geometry.layers)
        for index, number in zip(indices, kept.sum(1).tolist(), strict=True):
            widths = layers[index].expert_intermediate_sizes[:number]
            layers[index] = replace(layers[index], expert_intermediate_sizes=widths)
        return budget.measure(budget.geometry.with_layers(tuple(layers)))

    def kept(number: int) -> torch.Tensor:
        return kept_experts(scores, 1 - number / scores.numel(), "global", least)

    smallest = least * len(scores)
    if cost(kept(smallest)) > budget.allowed:
        raise InputError(
            f"--target-{budget.target.measure} {budget.target.value:g} cannot be reached by removing experts: each of "
            f"{len(scores)} layers keeps the {least} of {count} that its router chooses (num_experts_per_tok); ask for "
            "less, or take another --method"
        )
    number = bisect_right(range(smallest, scores.numel() + 1), budget.allowed, key=lambda number: cost(kept(number)))
    return kept(smallest + number - 1)


@contextmanager
def _sums(experts: list[nn.Module], num_experts: int) -> Iterator[list[torch.Tensor]]:
    """For each layer float64 [2, experts]: weighted norms of what its experts compute while the block runs, and of how
    many tokens."""
    sums = [torch.zeros(2, num_experts, dtype=torch.float64) for _ in experts]

    def add(total: torch.Tensor, module: Any, args: tuple[torch.Tensor, ...]) -> None:
        for expert, product, weights in routed_products(module, args):
            norms = output_of(module, expert, product).float().norm(dim=1)
            total[0, expert] += float((norms * weights.float()).sum())
            total[1, expert] += len(weights)

    with ExitStack() as stack:
        for module, total in zip(experts, sums, strict=True):
            handle = module.register_forward_pre_hook(lambda module, args, total=total: add(total, module, args))
            stack.callback(handle.remove)
        yield sums
