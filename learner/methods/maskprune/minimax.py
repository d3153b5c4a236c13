"""MaskPrune's constraints: how many units every row loses, and the multipliers that drive the masks there.

A row is what has a width of its own in a uniform model: a layer, or one of its experts. With m the masks of a row,
||m||_{n,2} the norm of its n smallest entries, s the units that each row of a kind loses and M(s) the parameters that
are left (arXiv 2502.14008, section 3; the equations have no numbers there):

    min_{m,s} max_{y,z>=0}  L(m) + y sum_rows ||m||^2_{ceil(s),2} + z (M(s) - M_prune)

- m: after a step of the optimizer, `shrink_smallest` is the proximal step in closed form.
- s: descends; ceil passes gradients straight through, and d||m||^2_{n,2} / dn is the (n+1)-th smallest m^2.
- y and z: ascend along their violations.

The paper prints neither rates nor scales. Ours: both violations are shares, the norm as a mean over all units of a kind
and the parameters by what the kinds hold, so that no rate depends on the size of the model; s moves as a share of its
width; s stops at the budget, beyond which no term of the objective asks it to go and z would be slow to take it back.
"""

import math
from collections.abc import Mapping, Sequence

import torch


def shrink_smallest(masks: torch.Tensor, count: int, weight: float) -> torch.Tensor:
    """argmin_m 1/2 ||m - masks||^2 + weight * sum_rows ||m||^2_{count,2}.

    In each row of `masks` [rows, units] the `count` entries nearest to zero are divided by 1 + 2 weight.
    """
    nearest = masks.abs().argsort(dim=1, stable=True)[:, :count]
    return masks.scatter(1, nearest, masks.gather(1, nearest) / (1 + 2 * weight))


def smallest_square_norm(masks: torch.Tensor, count: int) -> torch.Tensor:
    """||m||^2_{count,2} of each row [rows, units]."""
    return masks.square().sort(dim=1).values[:, :count].sum(1)


def next_smallest_square(masks: torch.Tensor, count: int) -> torch.Tensor:
    """The (count+1)-th smallest m^2 of each row [rows, units], or the last: what one more unit would cost."""
    return masks.square().sort(dim=1).values[:, min(count, masks.shape[1] - 1)]


class Minimax:
    """s, y and z.

    Args:
        widths: units in a row, by kind.
        parameters: parameters, or another cost, that go if all units of a kind go.
        removed: units of a row that the budget removes, by kind; may be fractions where kinds share a budget.
        budgets: kinds that share a budget of parameters, and with it a multiplier: s moves between them.
        rates: of s, y and z.
        start: of y and z.

    Attributes:
        s: float64 [kinds], share of the units of a row.
        y: float64 [1].
        z: float64 [budgets].
    """

    def __init__(
        self,
        widths: Mapping[str, int],
        parameters: Mapping[str, float],
        removed: Mapping[str, float],
        budgets: Sequence[Sequence[str]],
        rates: tuple[float, float, float],
        start: float,
    ) -> None:
        self.kinds, self._widths, self._rates = list(widths), dict(widths), rates
        self._target = torch.tensor([removed[kind] / widths[kind] for kind in self.kinds], dtype=torch.float64)
        self._largest = torch.tensor([1 - 1 / widths[kind] for kind in self.kinds], dtype=torch.float64)
        held = torch.tensor(
            [[parameters[kind] * (kind in budget) for kind in self.kinds] for budget in budgets], dtype=torch.float64
        )
        self._costs = held / held.sum(1, keepdim=True)  # [budgets, kinds]
        # Times the number of kinds: s rises equally fast whether kinds share a budget or have one each.
        self._push = self._costs.T * held.count_nonzero(dim=1)
        self.s = torch.zeros_like(self._target)
        self.y = torch.full((1,), start, dtype=torch.float64)
        self.z = torch.full((len(held),), start, dtype=torch.float64)

    def count(self, kind: str) -> int:
        """ceil(s): units of each row that are on their way out."""
        return math.ceil(round(self.s[self.kinds.index(kind)].item() * self._widths[kind], 6))

    def final_counts(self) -> dict[str, int]:
        """By kind, units to remove from each row: s rounded, but up for the finest kind, so that each budget is met."""
        counts: dict[str, int] = {}
        shares = dict(zip(self.kinds, self.s.tolist(), strict=True))
        for costs in self._costs:
            cost = {kind: share for kind, share in zip(self.kinds, costs.tolist(), strict=True) if share}
            *coarse, finest = sorted(cost, key=lambda kind: cost[kind] / self._widths[kind], reverse=True)
            counts |= {kind: round(shares[kind] * self._widths[kind]) for kind in coarse}
            left = (costs @ self._target).item() - sum(
                cost[kind] * counts[kind] / self._widths[kind] for kind in coarse
            )
            width = self._widths[finest]
            counts[finest] = min(max(0, math.ceil(round(left / cost[finest] * width, 6))), width - 1)
        return counts

    def excess(self) -> torch.Tensor:
        """M(s) - M_prune of each budget, as a share of the parameters that its kinds hold."""
        return self._costs @ (self._target - self.s)

    def update(self, masks: Mapping[str, torch.Tensor]) -> None:
        """One step of s, then y, then z; `masks` [rows, units] by kind."""
        rate_s, rate_y, rate_z = self._rates
        pull = torch.stack([next_smallest_square(masks[kind], self.count(kind)).double().mean() for kind in self.kinds])
        self.s -= rate_s * (self.y * pull.cpu() - self._push @ self.z)
        self.s.clamp_(min=torch.zeros_like(self.s), max=self._largest)
        beyond = (-self.excess()).clamp(min=0) / self._costs.square().sum(1)
        self.s.sub_(self._costs.T @ beyond).clamp_(min=0)
        norms = [
            smallest_square_norm(masks[kind], self.count(kind)).double().mean() / self._widths[kind]
            for kind in self.kinds
        ]
        self.y += rate_y * torch.stack(norms).mean().cpu()
        self.z.add_(rate_z * self.excess()).clamp_(min=0)
