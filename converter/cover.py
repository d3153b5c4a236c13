"""The cheapest cover of many layers by few shapes, proven optimal.

The problem is the p-median problem: open at most `limit` shapes, give each layer the cheapest open shape it fits into.
Where sizes are one number, a dynamic program over the sorted sizes solves it; heads and widths together are two or
three numbers, no order of the layers suits them all, and such a program misses the optimum. So this is a branch and
bound with Lagrangian bounds. Let every layer pay a price u_i for being left out: then the shapes no longer depend on
each other, a shape's profit is the sum of u_i - cost over the layers that gain by it, and for any prices

    sum of u_i - the `limit` largest profits <= total of every cover

Subgradient steps on the prices raise the bound. A shape whose opening (or closing) would lift it above the best cover
found is closed (or opened) for good; branching decides the rest. Prices and costs are whole numbers, so neither the
bounds nor the proof contain rounding.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

TOTAL_RANGE = 1 << 40  # costs are scaled up until totals are about this large, so that whole prices are fine enough
ROOT_STEPS, NODE_STEPS = 800, 80  # subgradient steps; more of them mean fewer nodes
PATIENCE = 15  # steps without a better bound before steps become smaller
SMALLEST_STEP = 1e-4


def cheapest_cover(fits: torch.Tensor, costs: Sequence[int], weights: Sequence[int], limit: int) -> list[int]:
    """Chooses a shape for every layer, at most `limit` different ones, with the lowest possible total.

    Args:
        fits: bool [shapes, layers]; whether the layer fits into the shape.
        costs: of one layer of each shape, at least 0 and not all 0.
        weights: how many layers each column of `fits` stands for.

    Returns:
        for each column of `fits` the index of its shape.

    Raises:
        ValueError: no `limit` shapes cover all layers.
    """
    search = _Search(fits, costs, weights, limit)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are small: where cores are busy, waiting for threads takes 20 times as long
    try:
        search.run()
    finally:
        torch.set_num_threads(threads)
    opened = search.table[search.best]
    if int(opened.amin(0).max()) == search.missing:
        raise ValueError(f"no {limit} of the {len(costs)} shapes cover all {fits.shape[1]} layers")
    return search.best[opened.argmin(0)].tolist()


@dataclass(frozen=True)
class _Node:
    """A part of the search: covers that use all of `opened` and any of `free`.

    Attributes:
        opened, free: indices of shapes.
        prices: of leaving each layer out, from which to improve the bound.
    """

    opened: torch.Tensor
    free: torch.Tensor
    prices: torch.Tensor


class _Search:
    def __init__(self, fits: torch.Tensor, costs: Sequence[int], weights: Sequence[int], limit: int):
        scale = max(1, TOTAL_RANGE // (max(costs) * sum(weights)))
        self.fits = fits
        self.costs = torch.tensor(costs) * scale
        self.weights = torch.tensor(weights)
        self.limit = min(limit, len(costs))
        # The totals of two covers differ by a multiple of this, so a better one is better by this much.
        self.quantum = max(1, scale * math.gcd(*(cost - costs[0] for cost in costs)))
        self.missing = int(self.costs.max()) * sum(weights) + 1  # no shape at all: dearer than any cover
        self.table = torch.where(fits, self.costs[:, None], self.missing)  # [shapes, layers]
        self.best, self.best_total = torch.tensor([0]), self._total(torch.tensor([0]))

    def run(self) -> None:
        """Leaves the shapes of an optimal cover in `best`."""
        self._find_good_cover()
        prices, no_shapes = self.table[self.best].amin(0), torch.tensor([], dtype=torch.long)
        waiting = [_Node(no_shapes, torch.arange(len(self.costs)), prices)]
        steps = ROOT_STEPS
        while waiting:
            node = self._tighten(waiting.pop(), steps)
            steps = NODE_STEPS
            if node is None:
                continue
            profits = self._gains(node.free, node.prices) @ self.weights
            pick = int(profits.argmax())
            rest = torch.cat((node.free[:pick], node.free[pick + 1 :]))
            waiting.append(_Node(node.opened, rest, node.prices))
            waiting.append(_Node(torch.cat((node.opened, node.free[pick, None])), rest, node.prices))  # searched first

    def _total(self, opened: torch.Tensor) -> int:
        return int(self.table[opened].amin(0) @ self.weights)

    def _consider(self, opened: torch.Tensor) -> None:
        if len(opened) and (total := self._total(opened)) < self.best_total:
            self.best, self.best_total = opened, total

    def _find_good_cover(self) -> None:
        """A start: adds shapes greedily, then replaces one at a time for as long as that helps."""
        covered, opened = torch.full_like(self.table[0], self.missing), []
        for _ in range(self.limit):
            opened.append(int((torch.minimum(self.table, covered) @ self.weights).argmin()))
            covered = torch.minimum(covered, self.table[opened[-1]])
        self._consider(torch.tensor(opened))
        before = None
        while before != self.best_total:
            before, opened = self.best_total, self.best
            for index in range(len(opened)):
                others = torch.cat((opened[:index], opened[index + 1 :]))
                covered = self.table[others].amin(0) if len(others) else torch.full_like(self.table[0], self.missing)
                replacement = (torch.minimum(self.table, covered) @ self.weights).argmin()
                self._consider(torch.cat((others, replacement[None])))

    def _gains(self, shapes: torch.Tensor, prices: torch.Tensor) -> torch.Tensor:
        """[shapes, layers]: what a layer gains when the shape is open and the layer need not pay its price."""
        return (prices - self.costs[shapes, None]).clamp(min=0) * self.fits[shapes]

    def _tighten(self, node: _Node, steps: int) -> _Node | None:
        """Raises the node's bound and decides shapes by it; None once it can hold nothing better than `best`."""
        opened, free, prices = node.opened, node.free, node.prices
        best_bound, best_prices, step, stale = None, prices, 1.0, 0
        for _ in range(steps):
            # A layer never pays more than an open shape costs. So open shapes have no profit to count.
            cap = self.table[opened].amin(0) if len(opened) else torch.full_like(prices, self.missing)
            prices = torch.minimum(prices, cap)
            room = self.limit - len(opened)
            gains = self._gains(free, prices)
            profits = gains @ self.weights
            order = profits.argsort(descending=True)
            chosen = order[:room]
            bound = int(prices @ self.weights - profits[chosen].sum())
            self._consider(torch.cat((opened, free[chosen])))
            slack = self.best_total - self.quantum - bound
            if slack < 0 or room == 0 or len(free) <= room:  # the last two: what was just considered is all there is
                return None
            if best_bound is None or bound > best_bound:
                best_bound, best_prices, stale = bound, prices, 0
            elif (stale := stale + 1) == PATIENCE:
                step, stale = step / 2, 0
            subgradient = self.weights * (1 - (gains[chosen] > 0).sum(0))
            subgradient = torch.where(prices >= cap, subgradient.clamp(max=0), subgradient)
            length = int(subgradient @ subgradient)

            is_chosen = torch.zeros(len(free), dtype=torch.bool).index_fill_(0, chosen, True)
            last, following = profits[order[room - 1]], profits[order[room]]
            closed = ~is_chosen & (last - profits > slack)
            needed = is_chosen & (profits - following > slack)
            opened, free = torch.cat((opened, free[needed])), free[~(closed | needed)]
            if length == 0 or step < SMALLEST_STEP:
                break
            prices = (prices + (step * (self.best_total - bound) / length * subgradient).round().long()).clamp(min=0)
        return _Node(opened, free, best_prices) if len(free) else None
