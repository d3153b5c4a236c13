"""From parameters to masks and to what counts against the budget: DDP's gate, and the hard-concrete ones it replaces.

Equation numbers are those of arXiv 2603.08065. Each unit has one parameter z; m is its mask, s its retention score:

    relu                         m = ReLU(z), unbounded above (11), s = phi(z; mu), sharper as mu falls (12)
    deterministic-hard-concrete  m = s = phi(z; mu)
    hard-concrete                m = clamp(1.2 sigmoid(a + logit(u)) - 0.1, 0, 1), u drawn anew for every step (8),
                                 s = P(m > 0) = sigmoid(a + ln 11) (9),  with a = ln(11) (z - 0.5) / 0.5

where phi(z; mu) = clamp(1.2 sigmoid(ln(11) (ReLU(z) - mu) / mu) - 0.1, 0, 1). The last two are the paper's ablation; it
does not print how it parametrizes them. Here all three begin at z = 1, which is m = 1 without noise, and share learning
rates. Deterministic masks are sharpened as DDP's scores are, so that DDP differs from them in nothing but m. With mu
held at 0.5, most masks of a short run end between 0 and 1: they count as parts of units, but cannot be removed.

ReLU and clamp pass gradients straight through where nothing is drawn: at z = 1 = 2 mu the score is exactly saturated
and would never move.
"""

import math

import torch

STRETCH_LOW, STRETCH_HIGH = -0.1, 1.1  # l and r of equations (8) and (12)
SLOPE = math.log(11)  # C0: makes phi(0) = 0, phi(mu) = 0.5, phi(2 mu) = 1; also ln(-r / l)
HARD_CONCRETE_MU = 0.5
GONE = {"relu": 0.0, "deterministic-hard-concrete": 0.0, "hard-concrete": -1.0}  # z of a unit that is as good as gone


def straight_through(forward: torch.Tensor, backward: torch.Tensor) -> torch.Tensor:
    """The value of `forward` with the gradient of `backward`."""
    return backward + (forward - backward).detach()


def relu(z: torch.Tensor) -> torch.Tensor:
    """Equation (11), m = ReLU(z), with the gradient of the identity."""
    return straight_through(z.clamp(min=0), z)


def retention(z: torch.Tensor, mu: float) -> torch.Tensor:
    """Equation (12) on m = ReLU(z): how much of each unit stays, in [0, 1]."""
    stretched = _stretched(SLOPE * (relu(z) - mu) / mu)
    return straight_through(stretched.clamp(0, 1), stretched)


def masks(z: torch.Tensor, gate: str, mu: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """What the units' outputs are multiplied by while learning; "hard-concrete" needs a generator for its noise."""
    if gate != "hard-concrete":
        return relu(z) if gate == "relu" else retention(z, mu)
    u = torch.rand(z.shape, generator=generator).clamp(1e-6, 1 - 1e-6).to(z)
    return _stretched(_logit(z) + torch.logit(u)).clamp(0, 1)


def scores(z: torch.Tensor, gate: str, mu: float) -> torch.Tensor:
    """Retention scores: what the budget counts."""
    return torch.sigmoid(_logit(z) + SLOPE) if gate == "hard-concrete" else retention(z, mu)


def deployed(z: torch.Tensor, gate: str, mu: float, stays: torch.Tensor) -> torch.Tensor:
    """Masks without noise, of z [layers, units]; units that do not stay (bool, of the same shape) have 0.

    Those of "hard-concrete" are their means over the noise, sigmoid(0.8 a) within 0.01; all are above 0, so which units
    stay must be decided by an order of them. That is practice since CoFi (arXiv 2204.00408).
    """
    if gate == "hard-concrete":
        return torch.sigmoid(0.8 * _logit(z)) * stays
    return masks(z, gate, mu) * (stays & (z > 0))  # phi(0; mu) may be 1e-8 in float32


def largest(values: torch.Tensor, number: int) -> torch.Tensor:
    """Which of values [groups, units] are the `number` largest of their group."""
    return values.argsort(dim=1, descending=True).argsort(dim=1) < number


def _logit(z: torch.Tensor) -> torch.Tensor:
    return SLOPE * (z - HARD_CONCRETE_MU) / HARD_CONCRETE_MU


def _stretched(logit: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(logit) * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW
