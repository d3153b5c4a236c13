"""Depth pruning: a baseline that removes whole layers, those that change their input least.

ShortGPT (arXiv 2403.03853) scores a layer by its block influence, how far it turns the hidden states:

    BI = 1 - mean over tokens of  cos(input, output)

The layers of the smallest go, all at once, until the budget is met to a layer. All masks of such a layer are 0, so
convert-pruned leaves out its attention and its MLP, and what is served runs fewer layers.

    learn-masks MODEL ckpt/ --method depth --sparsity 0.2 --data text/*.txt
"""

from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F

from learner.methods.baselines import check_finite
from learner.methods.method import Learned, Task
from learner.model.budget import Budget, CostBudget, UnitBudget
from learner.model.units import Units, Values
from pruned_vllm.common.errors import InputError


def learn(task: Task) -> Learned:
    """Masks of 0 and 1, one number for all of a layer; see learner/methods/method.py."""
    layers, units = task.model.model.layers, task.units
    if partial := [str(index) for index, layer in enumerate(layers) if not _is_covered(layer, index, units)]:
        raise InputError(
            f"depth removes whole layers, but masks reach only a part of layers {', '.join(partial)}: they cannot "
            "remove shared experts, linear attention, or attention with a latent vector; leave out "
            "--head-sparsity, or choose another --method"
        )
    for budget in task.budgets:
        if isinstance(budget, UnitBudget) and len(set(budget.sparsity.values())) > 1:
            raise InputError("depth removes whole layers, heads and channels together; leave out --head-sparsity")
    scores = influence(task)
    check_finite(units, {kind: scores[list(indices), None] for kind, indices in units.layers.items()})
    best_first = scores.argsort(descending=True, stable=True)
    candidates = [_masks(best_first[:number], len(layers), units) for number in range(len(layers) + 1)]
    return Learned.of_budgets([candidates[_number_kept(budget, candidates)] for budget in task.budgets])


def _masks(kept: torch.Tensor, num_layers: int, units: Units) -> Values:
    stays = torch.zeros(num_layers).index_fill(0, kept, 1.0)
    return {kind: stays[list(units.layers[kind]), None].expand(units.shape(kind)).clone() for kind in units.layers}


def _number_kept(budget: Budget, candidates: list[Values]) -> int:
    """How many layers stay, of `candidates` with none, one, ... all of them: at least one.

    Raises InputError where a cost allows none.
    """
    num_layers = len(candidates) - 1
    if isinstance(budget, UnitBudget):
        return max(1, round(num_layers * (1 - max(budget.sparsity.values()))))
    assert isinstance(budget, CostBudget)
    number = sum(budget.costs.of_units(values).item() <= budget.room for values in candidates) - 1
    if number < 1:
        raise InputError(
            f"--target-{budget.target.measure} {budget.target.value:g} cannot be reached by removing layers: it leaves "
            "less than one layer costs; ask for less, or take another --method"
        )
    return number


def _is_covered(layer: Any, index: int, units: Units) -> bool:
    mlp: Any = layer.mlp
    shared = hasattr(mlp, "shared_expert") or hasattr(mlp, "shared_experts")
    kinds = {kind for kind, indices in units.layers.items() if index in indices}
    return "head" in kinds and len(kinds) == 2 and not shared


@torch.no_grad()
def influence(task: Task) -> torch.Tensor:
    """Block influence of every layer, float32 [layers] on the CPU."""
    accelerator, layers = task.accelerator, task.model.model.layers
    sums = torch.zeros(len(layers), 2, dtype=torch.float64, device=accelerator.device)  # of cosines, and tokens

    def add(index: int, before: torch.Tensor, after: torch.Tensor) -> None:
        cosines = F.cosine_similarity(before.to(after.device).float(), after.float(), dim=-1)
        sums[index] += torch.tensor([float(cosines.double().sum()), cosines.numel()], device=sums.device)

    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            handle = layer.register_forward_hook(lambda module, args, output, index=index: add(index, args[0], output))
            stack.callback(handle.remove)
        for tokens in task.calibration("depth"):
            task.model.model(input_ids=tokens, use_cache=False)
    cosines, tokens = accelerator.reduce(sums).unbind(1)
    return (1 - cosines / tokens).float().cpu()
