"""DDP: Deterministic Differentiable (Structured) Pruning, arXiv 2603.08065. Equation numbers are the paper's.

The model is frozen. Each unit k (a head, an FFN channel, a channel of an expert) has one number z_k, and everything is
deterministic:

    m = ReLU(z)                    what the unit's output is multiplied by, unbounded above         (11)
    s = clamp(1.2 v - 0.1, 0, 1),  v = sigmoid(ln(11) (z - mu) / mu)     retention score            (12)
    L = L_ce + eta KL(teacher || student) + sum over kinds of
        lambda1 (mean s - rho) + lambda2 (mean s - rho)^2 + lambda3 mean s (1 - s)         (13) (15) (16) (17)

z descends, the multipliers ascend at the same time, and mu falls from 0.5 to 0.05 so that s turns into a step (14).
After each step z is clamped from below at -0.1, so that a pruned unit can come back (as the authors' code does; the
paper does not say it). Heads, channels and channels of experts have budgets and multipliers of their own. Layers and
experts share them, so that an expert that is rarely chosen may lose all; with `settings.budget` each layer or each
expert has its own, and the penalty is the mean over these groups (19). There the paper shares the multipliers.
`settings.gate` puts the hard-concrete gates of the paper's ablation in place of (11) and (12): see gates.py.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from learner.job import DDPSettings
from learner.methods import gates
from learner.methods.method import Learned, Task
from learner.model.loss import IGNORED, chunked_sum, logits_of, next_tokens, run_without_head
from learner.model.units import Values, sparsity
from learner.run.training import Training

Z_MINIMUM = -0.1
TOLERANCE = 0.01  # share of a group's units; if more are left, the smallest masks are set to 0


def annealed_mu(progress: float, settings: DDPSettings) -> float:
    """Equation (14); `progress` runs from 0 to 1."""
    return settings.mu_start - (settings.mu_start - settings.mu_end) * math.sqrt(progress)


def penalty(s: torch.Tensor, keep_ratio: float, multipliers: torch.Tensor) -> torch.Tensor:
    """Equations (13), (15) and (19) for one kind of unit: s [groups, units], multipliers [3, groups]."""
    violation = s.mean(1) - keep_ratio
    terms = torch.stack([violation, violation**2, (s * (1 - s)).mean(1)])
    return (multipliers * terms).sum(0).mean()


def learn(task: Task) -> Learned:
    """Learns m for every unit; see learner/methods/method.py."""
    settings, units, device = task.settings, task.units, task.accelerator.device
    generator = torch.Generator().manual_seed(task.seed)
    z, multipliers, groups, kept, keep_ratio = {}, {}, {}, {}, {}
    for kind in units.layers:
        z[kind] = nn.Parameter((1 + 0.01 * torch.randn(units.shape(kind), generator=generator)).to(device))
        groups[kind] = units.num_groups(kind, settings.budget)
        multipliers[kind] = [nn.Parameter(torch.zeros(groups[kind], device=device)) for _ in range(3)]
        kept[kind] = units.kept(kind, task.target_sparsity[kind], settings.budget)
        keep_ratio[kind] = kept[kind] * groups[kind] / units.count(kind)
    optimizer = _optimizer(z, multipliers, settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warmup_cosine(step, settings))
    state = {"optimizer": optimizer, "schedule": schedule} | {f"z_{kind}": values for kind, values in z.items()}
    state |= {f"lambda{i + 1}_{kind}": lambdas[i] for kind, lambdas in multipliers.items() for i in range(3)}
    training = Training(task, z.values(), state)

    def deployed(mu: float) -> Values:
        return {kind: gates.deployed(values.detach(), settings.gate, mu, groups[kind]) for kind, values in z.items()}

    def masks(step: int, mu: float) -> dict[str, torch.Tensor]:
        return units.to_masks(_masks(z, mu, task, step))

    for step in training.steps():
        mu = annealed_mu(step / settings.steps, settings)
        loss = training.backward(
            partial(masks, step, mu),
            partial(_task_loss, task),
            partial(_teacher, task.model) if settings.kd_weight else None,
        )
        constraint = torch.zeros((), device=device)
        for kind, values in z.items():
            scores = gates.scores(values, settings.gate, mu).view(groups[kind], -1)
            constraint = constraint + penalty(scores, keep_ratio[kind], torch.stack(tuple(multipliers[kind])))
        constraint.backward()
        if settings.gate == "hard-concrete":  # its scores never reach 0 or 1, so (15) is left out
            for lambdas in multipliers.values():
                lambdas[2].grad = None
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if settings.gate != "hard-concrete":
            with torch.no_grad():
                for values in z.values():
                    values.clamp_(min=Z_MINIMUM)
        shares = {f"{kind}_sparsity": sparsity(m) for kind, m in deployed(mu).items()}
        training.report(step, loss=loss, mu=mu, **shares)

    tell = task.accelerator.print
    return Learned(
        {
            kind: _harden(kind, m.float().cpu(), z[kind].detach().cpu(), kept[kind], groups[kind], tell)
            for kind, m in deployed(settings.mu_end).items()
        }
    )


def _masks(z: dict[str, nn.Parameter], mu: float, task: Task, step: int) -> Values:
    noise = torch.Generator().manual_seed(task.seed * 1_000_003 + step)  # the same in every forward pass of a step
    return {kind: gates.masks(values, task.settings.gate, mu, noise) for kind, values in z.items()}


def _teacher(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Hidden states of the dense model, from which logits are made where they are needed."""
    return run_without_head(model, tokens).last_hidden_state


def _task_loss(task: Task, tokens: torch.Tensor, teacher: torch.Tensor | None) -> torch.Tensor:
    """L_ce + eta KL(teacher || student), equation (17); means over tokens [batch, length]."""
    model, settings = task.model, task.settings
    number, predicted, temperature = tokens.numel(), tokens[:, 1:].numel(), settings.kd_temperature
    ce_weight = number / predicted if predicted else math.nan

    def loss_of(logits: torch.Tensor, targets: torch.Tensor, *dense: torch.Tensor) -> torch.Tensor:
        student = logits.log_softmax(-1)
        loss = ce_weight * F.nll_loss(student, targets, ignore_index=IGNORED, reduction="sum")
        for hidden in dense:
            with torch.no_grad():
                teacher = logits_of(model, hidden).div_(temperature).log_softmax(-1)
            student = student if temperature == 1 else (logits / temperature).log_softmax(-1)
            divergence = F.kl_div(student, teacher, reduction="sum", log_target=True)
            loss = loss + settings.kd_weight * temperature**2 * divergence
        return loss

    others = [next_tokens(tokens)] if teacher is None else [next_tokens(tokens), teacher]
    return chunked_sum(model, loss_of, run_without_head(model, tokens).last_hidden_state, *others) / number


def _optimizer(
    z: dict[str, nn.Parameter], multipliers: dict[str, list[nn.Parameter]], settings: DDPSettings
) -> torch.optim.Optimizer:
    """Descends in z and ascends in the multipliers, each with a learning rate of its own."""
    dual = [
        {
            "params": [lambdas[i] for lambdas in multipliers.values() for i in which],
            "lr": learning_rate,
            "maximize": True,
        }
        for which, learning_rate in (((0, 2), settings.lambda_learning_rate), ((1,), settings.lambda2_learning_rate))
    ]
    return torch.optim.AdamW([{"params": list(z.values()), "lr": settings.learning_rate}, *dual], weight_decay=0.0)


def _warmup_cosine(step: int, settings: DDPSettings) -> float:
    warmup = settings.steps // 10 if settings.warmup_steps is None else settings.warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, settings.steps - warmup)))


def _harden(
    kind: str,
    masks: torch.Tensor,
    z: torch.Tensor,
    wanted: int,
    groups: int = 1,
    tell: Callable[[str], None] = print,
) -> torch.Tensor:
    """Masks [layers, units]; where they leave more units of a group than `wanted` and the tolerance, only those with
    the largest z of the group stay (many masks of a gate that saturates are 1). Without groups a layer may lose all.
    """
    m = masks.view(groups, -1)
    kept, size = (m > 0).sum(1), m.shape[1]

    def message(wrong: torch.Tensor) -> str:
        number = int(wrong.sum())
        where = f" in {number} of {groups} groups" if groups > 1 else ""
        left = f"{int(kept[wrong].sum())} of {number * size} {kind} units are left{where}"
        return f"ddp: {left}, {number * wanted} were asked for"

    too_many, too_few = kept > wanted + TOLERANCE * size, kept < wanted - TOLERANCE * size
    if too_many.any():
        tell(f"{message(too_many)}; the {int((kept - wanted)[too_many].sum())} smallest masks were set to 0.")
        m = torch.where(too_many[:, None] & ~gates.largest(z.view_as(m), wanted), 0, m)
    if too_few.any():  # a removed unit contributes nothing, so bringing it back would not help
        tell(f"{message(too_few)}; train for more --steps or raise --lambda2-learning-rate.")
    return m.view_as(masks)
