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

Ours:
- A budget may be a cost (model/budget.py): then mean s becomes the share of the cost that scores leave, of all kinds
  together, and there is one set of multipliers.
- The budget is met by learning (stages.py). Near the end masks fade, the smallest first, until those that are left
  meet the budget to the unit; then the units that stay are fixed, and their masks settle. `--settle 0` is the paper's:
  what is beyond the budget after the last step is cut off.
- Several budgets follow each other in one run. What one has removed stays removed.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from learner.methods import gates
from learner.methods.method import Learned, Task
from learner.methods.stages import Moment, Stages, warmup_cosine
from learner.model.loss import Teacher, next_token_loss, run_without_head
from learner.model.units import Values, sparsity
from learner.run.training import Training
from learner.settings import DDPSettings

Z_MINIMUM = -0.1
HALF = 0.499  # a score that counts as 1/2: it is computed in float32
TOLERANCE = 0.005  # share of a budget that may be cut off without a word


def annealed_mu(progress: float, settings: DDPSettings) -> float:
    """Equation (14); `progress` runs from 0 to 1."""
    return settings.mu_start - (settings.mu_start - settings.mu_end) * progress**0.5


def penalty(left: torch.Tensor, undecided: torch.Tensor, keep: float, multipliers: torch.Tensor) -> torch.Tensor:
    """Equations (13), (15) and (19) for one constraint: mean s and mean s (1 - s) [groups], multipliers [3, groups]."""
    violation = left - keep
    return (multipliers * torch.stack([violation, violation**2, undecided])).sum(0).mean()


def learn(task: Task) -> Learned:
    """Learns m for every unit; see learner/methods/method.py."""
    run = _Run(task)
    training = Training(task, run.z.values(), run.state())
    teacher = partial(_teacher, task.model) if task.settings.kd_weight else None
    for step in training.steps():
        moment = run.begin(step)
        loss = training.backward(partial(run.masks, step, moment), partial(_task_loss, task), teacher)
        run.end(moment)
        training.report(step, loss=loss, **run.figures(moment))
    return Learned.of_budgets([{kind: m.float().cpu() for kind, m in of_budget.items()} for of_budget in run.found])


class _Run:
    """What a run learns.

    Attributes:
        z: by kind.
        found: for each budget, by kind, the masks that were found; zero until then.
    """

    def __init__(self, task: Task) -> None:
        self._task, self._units, self._settings = task, task.units, task.settings
        device, by = task.accelerator.device, task.settings.budget
        self._constraints = [budget.constraints(by) for budget in task.budgets]
        keeps = [budget.keep(by) for budget in task.budgets]
        self._stages = Stages(self._settings.steps, keeps, self._settings.settle)
        generator = torch.Generator().manual_seed(task.seed)
        self.z, self._stays, self.found = {}, {}, []
        for kind in self._units.layers:
            start = 1 + 0.01 * torch.randn(self._units.shape(kind), generator=generator)
            self.z[kind] = nn.Parameter(start.to(device))
            self._stays[kind] = torch.ones(start.shape, dtype=torch.bool, device=device)
        self.found = [{kind: torch.zeros_like(z.detach()) for kind, z in self.z.items()} for _ in task.budgets]
        self._multipliers = {
            name: [nn.Parameter(torch.zeros(constraint.num_groups, device=device)) for _ in range(3)]
            for name, constraint in self._constraints[0].items()
        }
        self._optimizer = _optimizer(self.z, self._multipliers, self._settings)

    def state(self) -> dict:
        """All that changes, for `Training`."""
        state: dict[str, Any] = {"optimizer": self._optimizer}
        state |= {f"z_{kind}": z for kind, z in self.z.items()}
        state |= {f"stays_{kind}": stays for kind, stays in self._stays.items()}
        state |= {f"lambda{i + 1}_{name}": lambdas[i] for name, lambdas in self._multipliers.items() for i in range(3)}
        for index, of_budget in enumerate(self.found):
            state |= {f"found{index}_{kind}": m for kind, m in of_budget.items()}
        return state

    def begin(self, step: int) -> Moment:
        """Sets the learning rates of a step, and begins a stage."""
        moment = self._stages.at(step)
        if moment.is_first and step:
            for parameter in (parameter for lambdas in self._multipliers.values() for parameter in lambdas):
                parameter.data.zero_()
                self._optimizer.state.pop(parameter, None)
        factor = warmup_cosine(moment, self._settings.warmup_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        return moment

    def masks(self, step: int, moment: Moment) -> dict[str, torch.Tensor]:
        """What outputs are multiplied by, under the keys of a mask file."""
        # the same noise in every forward pass of a step
        noise = torch.Generator().manual_seed(self._task.seed * 1_000_003 + step)
        gate, mu = self._settings.gate, annealed_mu(moment.progress, self._settings)
        values = {kind: gates.masks(z, gate, mu, noise) * self._stays[kind] for kind, z in self.z.items()}
        return self._units.to_masks(values)

    def end(self, moment: Moment) -> None:
        """The step itself, and what follows it."""
        if not moment.is_settled:
            self._penalize(moment)
        self._optimizer.step()
        self._optimizer.zero_grad()
        with torch.no_grad():
            if self._settings.gate != "hard-concrete":
                for z in self.z.values():
                    z.clamp_(min=Z_MINIMUM)
            if moment.share is not None:
                self._fade(moment)
            if moment.is_settled:
                self._keep(self._stays, moment)
            if moment.is_last and not moment.is_settled:
                self._fix(moment)
            if moment.is_last:
                for kind, m in self._deployed(moment).items():
                    self.found[moment.stage][kind].copy_(m)

    def figures(self, moment: Moment) -> dict[str, float]:
        """What is logged of a step: mu, the shares that are pruned, and how much more than the budget is left by units
        of a score of at least 1/2, as a share of what all units come to."""
        return {
            "mu": annealed_mu(moment.progress, self._settings),
            **{f"{kind}_sparsity": sparsity(m) for kind, m in self._deployed(moment).items()},
            "over": self._over(moment),
        }

    def _penalize(self, moment: Moment) -> None:
        gate, mu = self._settings.gate, annealed_mu(moment.progress, self._settings)
        scores = {kind: gates.scores(z, gate, mu) * self._stays[kind] for kind, z in self.z.items()}
        total = torch.zeros((), device=self._task.accelerator.device)
        for name, constraint in self._constraints[moment.stage].items():
            multipliers = torch.stack(tuple(self._multipliers[name]))
            total = total + penalty(constraint.left(scores), constraint.undecided(scores), constraint.keep, multipliers)
        total.backward()
        if gate == "hard-concrete":  # its scores never reach 0 or 1, so (15) is left out
            for lambdas in self._multipliers.values():
                lambdas[2].grad = None

    def _fade(self, moment: Moment) -> None:
        """Units beyond the budget of this step lose a share of z, the others keep some; in the last step they are
        fixed."""
        if moment.fading == 0:
            self._fix(moment)
            return
        support, gone = self._support(moment), gates.GONE[self._settings.gate]
        for kind, z in self.z.items():
            faded = torch.where(z > gone, gone + (z - gone) * moment.fading, z)
            z.copy_(torch.where(support[kind], z, faded))
        self._keep(support, moment)

    def _keep(self, support: Values, moment: Moment) -> None:
        """Units of the budget have a score of at least 1/2."""
        if self._settings.gate != "hard-concrete":
            mu = annealed_mu(moment.progress, self._settings)
            for kind, z in self.z.items():
                z.copy_(torch.where(support[kind], z.clamp(min=mu), z))

    def _support(self, moment: Moment) -> Values:
        """The units that stay, as far as the budget of this step goes."""
        budget, order = self._task.budgets[moment.stage], {kind: z.detach() for kind, z in self.z.items()}
        if moment.share is not None and moment.share < 1:
            budget = budget.approached(moment.share, self._task.budgets[moment.stage - 1] if moment.stage else None)
        support = budget.support(order, self._settings.budget, self._stays)
        return {kind: stays.to(self.z[kind].device) for kind, stays in support.items()}

    def _fix(self, moment: Moment) -> None:
        """From now on the units of the budget alone stay."""
        over = self._over(moment)
        if over > TOLERANCE:
            self._task.accelerator.print(
                f"ddp: learning left {over:.1%} more than the budget; the smallest masks were set to 0. Train for more "
                "--steps, or with a longer --settle."
            )
        for kind, stays in self._support(moment).items():
            self._stays[kind].copy_(stays)

    def _over(self, moment: Moment) -> float:
        """See `figures`; the mean over the constraints."""
        gate, mu = self._settings.gate, annealed_mu(moment.progress, self._settings)
        scores = {kind: gates.scores(z.detach(), gate, mu) * self._stays[kind] for kind, z in self.z.items()}
        hard = {kind: (s >= HALF).to(s.dtype) for kind, s in scores.items()}
        found = [
            (constraint.left(hard) - constraint.keep).mean().item()
            for constraint in self._constraints[moment.stage].values()
        ]
        return sum(found) / len(found)

    def _deployed(self, moment: Moment) -> Values:
        gate, mu = self._settings.gate, annealed_mu(1 if moment.is_last else moment.progress, self._settings)
        return {kind: gates.deployed(z.detach(), gate, mu, self._stays[kind]) for kind, z in self.z.items()}


def _teacher(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Hidden states of the dense model, from which logits are made where they are needed."""
    return run_without_head(model, tokens).last_hidden_state


def _task_loss(task: Task, tokens: torch.Tensor, teacher_hidden: torch.Tensor | None) -> torch.Tensor:
    """L_ce + eta KL(teacher || student), equation (17); means over tokens [batch, length]."""
    model, settings = task.model, task.settings
    hidden = run_without_head(model, tokens).last_hidden_state
    if teacher_hidden is None:
        return next_token_loss(model, tokens, hidden)
    teacher = Teacher(model, teacher_hidden, settings.kd_weight, settings.kd_temperature)
    return next_token_loss(model, tokens, hidden, teacher)


def _optimizer(
    z: dict[str, nn.Parameter], multipliers: dict[str, list[nn.Parameter]], settings: DDPSettings
) -> torch.optim.Optimizer:
    """Descends in z and ascends in the multipliers, each with a learning rate of its own."""
    dual = [[lambdas[i] for lambdas in multipliers.values() for i in which] for which in ((0, 2), (1,))]
    groups = [
        {"params": list(z.values()), "lr": settings.learning_rate},
        {"params": dual[0], "lr": settings.lambda_learning_rate, "maximize": True},
        {"params": dual[1], "lr": settings.lambda2_learning_rate, "maximize": True},
    ]
    groups = [group | {"peak": group["lr"]} for group in groups]
    return torch.optim.AdamW(groups, weight_decay=0.0)
