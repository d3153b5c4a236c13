"""MaskPrune (arXiv 2502.14008): masks in [0, 1], and widths that come out the same in every layer.

The masks and a LoRA adapter descend  KL(student || teacher) + alpha sum_layers MSE(hidden states);  the teacher is the
same model without both. After each step of AdamW the masks take a proximal step towards as many zeros in every row as
the budget asks for, and the constraints move on (minimax.py). Masks of heads take it at every step, masks of channels
at every t-th, t falling from 10 to 1, so that a channel that shrank by mistake can grow back.

What the paper leaves open, and what is ours:
- Budgets. The paper has one resource, parameters, which the shares of heads and channels meet together. Here each kind
  has its own, so that `--sparsity` means the same as for other methods; `--resource model` is the paper's, where the
  shares of heads and of channels are found in learning and only the parameters they remove are given.
- Each layer's MSE is relative to the mean square of the teacher's hidden states, so that alpha has a meaning; the
  last layer's are those behind the final norm. The means are those of one forward pass, so that smaller micro batches
  move masks a little (2e-4 after 20 steps).
- All rates and starting values but the two learning rates and the interval. Rates are per run, not per step: twice the
  steps raise s, y and z half as fast. Learning rates fall linearly to zero.
- Channels of experts: every expert is a row, so all experts of all layers end at one width, as stock kernels want it.
- Query heads go with their KV head, or a uniform number of them would not be a uniform model.
- At the end exactly as many units as the budget says are set to zero in each row, whatever is left of their masks
  (`*_cut` in the log says how much that would be at each step). Other masks stay as they were learned.
- The paper multiplies the product of gate and up while it learns, but folds into both projections. These two do not
  compute the same. `--channel-mask-site` says which is learned; pruning.json tells the converter.
- LoRA: rank and alpha are those of NutePrune's code, with which the paper compares itself. That adapts q and v alone
  (`--lora-targets query-value`); all projections recover clearly more and cost little.
"""

import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from learner.methods.maskprune.minimax import Minimax, shrink_smallest
from learner.methods.method import Learned, Task
from learner.model.budget import CostBudget
from learner.model.loss import ReverseDivergence, chunked_sum, logits_of, run_without_head
from learner.model.projections import is_fused
from learner.model.units import Units
from learner.run.training import Training
from learner.settings import MaskPruneSettings
from pruned_vllm.common.errors import InputError

SMALLEST_KEPT = 1e-6  # smallest mask of a unit that stays: the converter removes units whose mask is 0
LORA_TARGETS = {
    "all": r".*\.(self_attn\.([qkvo]|qkv)_proj|mlp\.(gate|up|gate_up|down)_proj)",
    "query-value": r".*\.self_attn\.[qv]_proj",
}  # not on experts, which are no linear layers: Transformers holds all of a layer in two tensors
LARGE = 0.1  # if the masks that are cut have a larger mean, learning did not reach its target


def learn(task: Task) -> Learned:
    """Learns m for every unit and an adapter; see learner/methods/method.py."""
    settings, units = task.settings, task.units
    parameters = kind_parameters(task.model, units)  # before the adapter adds its own
    adapter = _add_adapter(task)
    lora = {name: parameter for name, parameter in task.model.named_parameters() if parameter.requires_grad}
    masks = {kind: nn.Parameter(torch.ones(units.shape(kind), device=task.accelerator.device)) for kind in units.layers}
    optimizer = torch.optim.AdamW(
        [
            {"params": list(masks.values()), "lr": settings.learning_rate},
            {"params": list(lora.values()), "lr": settings.lora_learning_rate},
        ],
        weight_decay=0.0,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / settings.steps)
    widths = {kind: row_width(units, kind) for kind in masks}
    minimax = _minimax(task, parameters, widths)
    state = {"optimizer": optimizer, "schedule": schedule, "s": minimax.s, "y": minimax.y, "z": minimax.z}
    state |= {f"mask_{kind}": values for kind, values in masks.items()} | lora
    training = Training(task, [*masks.values(), *lora.values()], state)

    def rows() -> dict[str, torch.Tensor]:
        return {kind: values.detach().view(-1, widths[kind]) for kind, values in masks.items()}

    for step in training.steps():
        loss = training.backward(
            lambda: units.to_masks(masks),
            lambda tokens, teacher: _loss(task.model, settings, tokens, teacher),
            lambda tokens: _teacher(task.model, adapter, tokens),
            settings.channel_mask_site,
        )
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        for kind, values in rows().items():
            if kind == "head" or step % prox_interval(step, settings) == 0:
                values.copy_(shrink_smallest(values, minimax.count(kind), settings.decay * minimax.y.item()))
            values.clamp_(0, 1)
        minimax.update(rows())
        training.report(step, loss=loss, **_figures(minimax, rows()))
    counts = minimax.final_counts()
    final = {kind: cut(values, counts[kind]) for kind, values in rows().items()}
    if task.accelerator.is_main_process:
        _warn_of_large_cuts(rows(), counts)
    return Learned(
        values={kind: values.view(units.shape(kind)).cpu() for kind, values in final.items()},
        channel_mask_site=settings.channel_mask_site,
        save_adapter=partial(_save_adapter, adapter) if lora else None,
    )


def prox_interval(step: int, settings: MaskPruneSettings) -> int:
    """Steps from one proximal step of the channels' masks to the next: falls linearly to 1."""
    progress = step / max(1, settings.steps - 1)
    return round(settings.prox_interval + (1 - settings.prox_interval) * progress)


def row_width(units: Units, kind: str) -> int:
    """Units of a row: of a layer, or of one expert."""
    return units.count(kind) // units.num_groups(kind, "expert")


def kind_parameters(model: PreTrainedModel, units: Units) -> dict[str, int]:
    """By kind, the parameters of a dense model that go with all units of the kind. Biases of outputs stay.

    For one head this is the paper's 4 d_h d_hidden in multi-head attention, for a channel its 3 d_hidden.
    """

    def linear(*modules: nn.Linear) -> int:
        return sum(module.weight.numel() + (0 if module.bias is None else module.bias.numel()) for module in modules)

    def count(kind: str, layer: Any) -> int:
        mlp = layer.mlp
        if kind == "head":
            attention = layer.self_attn
            fused = [attention.qkv_proj] if is_fused(model) else [attention.q_proj, attention.k_proj, attention.v_proj]
            return linear(*fused) + attention.o_proj.weight.numel()
        if kind == "channel":
            fused = [mlp.gate_up_proj] if is_fused(model) else [mlp.gate_proj, mlp.up_proj]
            return linear(*fused) + mlp.down_proj.weight.numel()
        parts = mlp.experts.named_parameters()
        return sum(parameter.numel() for name, parameter in parts if name != "down_proj_bias")

    layers = model.model.layers
    return {kind: sum(count(kind, layers[index]) for index in indices) for kind, indices in units.layers.items()}


def cut(masks: torch.Tensor, count: int) -> torch.Tensor:
    """Masks [rows, units] with the `count` smallest of each row 0, and the others above 0."""
    smallest = masks.argsort(dim=1, stable=True)[:, :count]
    return masks.clamp(min=SMALLEST_KEPT).scatter(1, smallest, 0)


def cut_share(masks: torch.Tensor, count: int) -> float:
    """What `cut` would take away, as a share of the sum of all masks [rows, units]."""
    return (masks.sort(dim=1).values[:, :count].sum() / masks.sum()).item()


def _minimax(task: Task, parameters: Mapping[str, int], widths: Mapping[str, int]) -> Minimax:
    """The constraints; where the budget is a cost, all kinds share it, and their units count by that cost."""
    settings, kinds, budget = task.settings, list(widths), task.budget
    held: Mapping[str, float]
    if isinstance(budget, CostBudget):
        held = {kind: budget.costs.of_kind(kind) for kind in kinds}
        removed = {kind: widths[kind] * (1 - budget.keep()) for kind in kinds}
        budgets = [kinds]
    else:
        held = parameters
        keeps = {kind: constraint.keep for kind, constraint in budget.constraints("expert").items()}
        removed = {kind: widths[kind] - round(widths[kind] * keeps[kind]) for kind in kinds}
        budgets = [kinds] if settings.resource == "model" else [[kind] for kind in kinds]
    return Minimax(
        widths=widths,
        parameters=held,
        removed=removed,
        budgets=budgets,
        rates=tuple(rate / settings.steps for rate in (settings.s_rate, settings.y_rate, settings.z_rate)),
        start=settings.multiplier_start,
    )


def _figures(minimax: Minimax, masks: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """What is logged of a step; `masks` [rows, units]."""
    counts = minimax.final_counts()
    return {
        "y": minimax.y.item(),
        "z": minimax.z.max().item(),
        **{f"{kind}_s": share for kind, share in zip(minimax.kinds, minimax.s.tolist(), strict=True)},
        **{f"{kind}_cut": cut_share(values, counts[kind]) for kind, values in masks.items()},
    }


def _warn_of_large_cuts(masks: Mapping[str, torch.Tensor], counts: Mapping[str, int]) -> None:
    for kind, values in masks.items():
        mean = values.sort(dim=1).values[:, : counts[kind]].mean().item()
        if mean > LARGE:
            tqdm.write(
                f"maskprune: the {kind} masks that were set to 0 at the end averaged {mean:.2f}, so learning did not "
                "reach its target; train for more --steps or raise --decay."
            )


def _add_adapter(task: Task) -> PeftModel | None:
    """Puts LoRA into `task.model`; None at rank 0."""
    settings = task.settings
    if not settings.lora_rank:
        return None
    if settings.lora_targets != "all" and is_fused(task.model):
        raise InputError(
            f"--lora-targets {settings.lora_targets} cannot be had: q, k and v are one projection in "
            f"{type(task.model).__name__}; use --lora-targets all, or --lora-rank 0"
        )
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        target_modules=LORA_TARGETS[settings.lora_targets],
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(task.seed)
        adapter = get_peft_model(task.model, config)
    with tempfile.TemporaryDirectory() as directory:  # what PEFT refuses to save, it refuses now, not at the end
        adapter.save_pretrained(directory, save_embedding_layers=False, state_dict={})
    return adapter


def _save_adapter(adapter: PeftModel, directory: str | Path) -> None:
    # Told what to save, PEFT does not look at the model's weights, which may be sharded.
    learned = {name: parameter for name, parameter in adapter.named_parameters() if parameter.requires_grad}
    adapter.save_pretrained(directory, save_embedding_layers=False, state_dict=learned)


def _outputs(model: PreTrainedModel, tokens: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Hidden states behind the final norm, and those that each layer leaves; of the last layer they are the same."""
    outputs = run_without_head(model, tokens, output_hidden_states=True)
    return outputs.last_hidden_state, outputs.hidden_states[1:]


def _teacher(model: PreTrainedModel, adapter: PeftModel | None, tokens: torch.Tensor) -> Any:
    with nullcontext() if adapter is None else adapter.disable_adapter():
        return _outputs(model, tokens)


def _loss(model: PreTrainedModel, settings: MaskPruneSettings, tokens: torch.Tensor, teacher: Any) -> torch.Tensor:
    """L_KL + alpha L_layer, KL(student || teacher) as printed; means over tokens [batch, length]."""
    (hidden, states), (teacher_hidden, teacher_states) = _outputs(model, tokens), teacher

    def divergence(logits: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            wanted = logits_of(model, dense)
        return ReverseDivergence.apply(logits, wanted)

    loss = chunked_sum(model, divergence, hidden, teacher_hidden) / tokens.numel()
    for student, wanted in zip(states, teacher_states, strict=True):
        distance = F.mse_loss(student.float(), wanted.float()) / wanted.float().square().mean()
        loss = loss + settings.layer_weight * distance.to(loss.device)
    return loss
