"""DDP: Deterministic Differentiable (Structured) Pruning, arXiv 2603.08065. Equation numbers are the paper's.

The model is frozen. Each unit k (a head, an FFN channel, a channel of an expert) has one number z_k, and everything is
deterministic:

    m = ReLU(z)                    what the unit's output is multiplied by, unbounded above         (11)
    s = clamp(1.2 v - 0.1, 0, 1),  v = sigmoid(ln(11) (z - mu) / mu)     retention score            (12)
    L = L_ce + eta KL(teacher || student) + sum over kinds of
        lambda1 (mean s - rho) + lambda2 (mean s - rho)^2 + lambda3 mean s (1 - s)         (13) (15) (16) (17)

z descends, the multipliers ascend at the same time, and mu falls from 0.5 to 0.05 so that s turns into a step (14).
ReLU and clamp pass gradients straight through: at the start z = 1 = 2 mu, where s is exactly saturated and would never
move. After each step z is clamped from below at -0.1, so that a pruned unit can come back (as the authors' code does;
the paper does not say it). Heads, channels and channels of experts have budgets and multipliers of their own. Layers
and experts share them, so that an expert that is rarely chosen may lose all; with `settings.budget` each layer or each
expert has its own, and the penalty is the mean over these groups (19). There the paper shares the multipliers.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm, trange

from learner.data import BlockSampler
from learner.masking import apply_masks
from learner.settings import DDPSettings
from learner.units import Units, Values, sparsity
from pruned_vllm.errors import InputError

Z_MINIMUM = -0.1
STRETCH_LOW, STRETCH_HIGH = -0.1, 1.1  # l and r of equation (12)
SLOPE = math.log(11)  # C0: makes s(0) = 0, s(mu) = 0.5, s(2 mu) = 1
TOLERANCE = 0.01  # of the units of a group; beyond it the largest masks decide which stay


def straight_through(forward: torch.Tensor, backward: torch.Tensor) -> torch.Tensor:
    """The value of `forward` with the gradient of `backward`."""
    return backward + (forward - backward).detach()


def gate(z: torch.Tensor) -> torch.Tensor:
    """Equation (11), m = ReLU(z), with the gradient of the identity."""
    return straight_through(z.clamp(min=0), z)


def retention(z: torch.Tensor, mu: float) -> torch.Tensor:
    """Equation (12) on m = ReLU(z): how much of each unit stays, in [0, 1]."""
    v = torch.sigmoid(SLOPE * (gate(z) - mu) / mu)
    stretched = v * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW
    return straight_through(stretched.clamp(0, 1), stretched)


def annealed_mu(progress: float, settings: DDPSettings) -> float:
    """Equation (14); `progress` runs from 0 to 1."""
    return settings.mu_start - (settings.mu_start - settings.mu_end) * math.sqrt(progress)


def penalty(s: torch.Tensor, keep_ratio: float, multipliers: torch.Tensor) -> torch.Tensor:
    """Equations (13), (15) and (19) for one kind of unit: s [groups, units], multipliers [3, groups]."""
    violation = s.mean(1) - keep_ratio
    terms = torch.stack([violation, violation**2, (s * (1 - s)).mean(1)])
    return (multipliers * terms).sum(0).mean()


def learn_ddp(
    model: nn.Module,
    units: Units,
    blocks: BlockSampler,
    target_sparsity: Mapping[str, float],
    settings: DDPSettings,
    seed: int,
) -> Values:
    """Learns m for every unit.

    Args:
        model: frozen causal LM; it is its own teacher, without masks.
        blocks: source of training batches.
        target_sparsity: share of the units to remove, by kind.

    Returns:
        m by kind, float32 [layers, units] on the CPU; 0 is pruned.

    Raises:
        InputError: the loss is no longer a number.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    z, multipliers, groups, kept, keep_ratio = {}, {}, {}, {}, {}
    for kind in units.layers:
        start = 1 + 0.01 * torch.randn(units.shape(kind), generator=generator)
        z[kind] = nn.Parameter(start.to(device))
        groups[kind] = units.num_groups(kind, settings.budget)
        multipliers[kind] = [nn.Parameter(torch.zeros(groups[kind], device=device)) for _ in range(3)]
        kept[kind] = units.kept(kind, target_sparsity[kind], settings.budget)
        keep_ratio[kind] = kept[kind] * groups[kind] / units.count(kind)
    optimizer = torch.optim.AdamW(
        [
            {"params": list(z.values()), "lr": settings.learning_rate},
            {
                "params": [lambdas[i] for lambdas in multipliers.values() for i in (0, 2)],
                "lr": settings.lambda_learning_rate,
                "maximize": True,
            },
            {
                "params": [lambdas[1] for lambdas in multipliers.values()],
                "lr": settings.lambda2_learning_rate,
                "maximize": True,
            },
        ],
        weight_decay=0.0,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warmup_cosine(step, settings))

    progress = trange(settings.steps, desc="ddp", unit="step")
    for step in progress:
        mu = annealed_mu(step / settings.steps, settings)
        batch = blocks.next_batch(settings.batch_size).to(device)
        micro_batches = batch.split(settings.micro_batch_size)
        task_loss = 0.0
        for micro_batch in micro_batches:
            teacher_logits = None
            if settings.kd_weight:
                with torch.no_grad():
                    teacher_logits = model(input_ids=micro_batch).logits
            with apply_masks(model, units.to_masks({kind: gate(values) for kind, values in z.items()})):
                loss = _task_loss(model, micro_batch, teacher_logits, settings) * len(micro_batch) / len(batch)
                loss.backward()
            task_loss += loss.item()
        if not math.isfinite(task_loss):
            raise InputError(
                f"ddp: the loss is {task_loss} at step {step + 1}; use --dtype bfloat16 or float32, "
                "a lower --learning-rate, or a --sequence-length of at least 2"
            )
        constraint = sum(
            penalty(retention(z[kind], mu).view(groups[kind], -1), keep_ratio[kind], torch.stack(multipliers[kind]))
            for kind in z
        )
        constraint.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for values in z.values():
                values.clamp_(min=Z_MINIMUM)
        progress.set_postfix(
            loss=f"{task_loss:.3f}",
            mu=f"{mu:.3f}",
            **{f"{kind}_sparsity": f"{sparsity(values.detach()):.3f}" for kind, values in z.items()},
        )
    return {kind: _harden(kind, values.detach().float().cpu(), kept[kind], groups[kind]) for kind, values in z.items()}


def _task_loss(model: nn.Module, tokens: torch.Tensor, teacher_logits: torch.Tensor | None, settings: DDPSettings):
    """L_ce + eta KL(teacher || student), equation (17); means over tokens [batch, length]."""
    logits = model(input_ids=tokens).logits.float()
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    if teacher_logits is None:
        return loss
    temperature = settings.kd_temperature
    student = F.log_softmax(logits.flatten(0, 1) / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.float().flatten(0, 1) / temperature, dim=-1)
    divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return loss + settings.kd_weight * temperature**2 * divergence


def _warmup_cosine(step: int, settings: DDPSettings) -> float:
    warmup = settings.steps // 10 if settings.warmup_steps is None else settings.warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, settings.steps - warmup)))


def _harden(kind: str, z: torch.Tensor, wanted: int, groups: int = 1) -> torch.Tensor:
    """m = ReLU(z) [layers, units]; where it leaves more units of a group than `wanted` and the tolerance, only the
    largest masks of the group stay. Without groups a layer may lose all of its units.
    """
    m = z.clamp(min=0).view(groups, -1)
    kept, size = (m > 0).sum(1), m.shape[1]

    def message(wrong: torch.Tensor) -> str:
        number = int(wrong.sum())
        where = f" in {number} of {groups} groups" if groups > 1 else ""
        left = f"{int(kept[wrong].sum())} of {number * size} {kind} units are left{where}"
        return f"ddp: {left}, {number * wanted} were asked for"

    too_many, too_few = kept > wanted + TOLERANCE * size, kept < wanted - TOLERANCE * size
    if too_many.any():
        tqdm.write(f"{message(too_many)}; the {int((kept - wanted)[too_many].sum())} smallest masks were set to 0.")
        smallest_kept = m.topk(wanted, dim=1).values[:, -1:]
        m = torch.where(too_many[:, None] & (m < smallest_kept), 0, m)
    if too_few.any():  # a removed unit contributes nothing, so bringing it back would not help
        tqdm.write(f"{message(too_few)}; train for more --steps or raise --lambda2-learning-rate.")
    return m.view_as(z)
