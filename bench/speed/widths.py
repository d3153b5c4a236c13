"""Shares of channels that experts keep: quantiles of a beta distribution, or a small model's spread over more experts.

    beta_shares(0.5, 128)           # 128 shares of mean 0.5, from 0.05 to 0.95
    quantiles([0.2, 1.0, 0.6], 32)  # 32 shares that are distributed like these three

Pure Python; the same arguments give the same shares.
"""

import random
from bisect import bisect
from collections.abc import Sequence
from itertools import accumulate

from pruned_vllm.common.errors import InputError

CONCENTRATION = 4  # the sum of beta's two parameters: at mean 0.5 it is beta(2, 2), from nearly none to nearly all
GRID = 10_000  # shares at which the density is summed up


def beta_shares(mean: float, count: int) -> list[float]:
    """The quantiles (i + 1/2) / count of beta(4 mean, 4 - 4 mean), 0 < mean < 1. Raises InputError."""
    if not 0 < mean < 1:
        raise InputError(f"the mean share that experts keep is {mean:g}; it must lie between 0 and 1")
    alpha, beta = CONCENTRATION * mean, CONCENTRATION * (1 - mean)
    shares = [(step + 0.5) / GRID for step in range(GRID)]
    below = list(accumulate(share ** (alpha - 1) * (1 - share) ** (beta - 1) for share in shares))
    return [shares[bisect(below, (index + 0.5) / count * below[-1])] for index in range(count)]


def quantiles(shares: Sequence[float], count: int) -> list[float]:
    """The quantiles (i + 1/2) / count of `shares`, by increasing size, linear between the shares."""
    ordered = sorted(shares)
    found = []
    for index in range(count):
        place = min(max(0.0, (index + 0.5) * len(ordered) / count - 0.5), len(ordered) - 1.0)
        below = int(place)
        above = min(below + 1, len(ordered) - 1)
        found.append(ordered[below] + (place - below) * (ordered[above] - ordered[below]))
    return found


def widths_of(shares: Sequence[float], full_width: int, align: int = 1, seed: int = 0) -> tuple[int, ...]:
    """Widths of experts that keep these shares of `full_width` channels, in an order drawn at random.

    They are multiples of `align`, but never more than `full_width`, and at least one multiple where a share is not 0.
    """
    widths = [min(full_width, max(1, round(share * full_width / align)) * align) if share else 0 for share in shares]
    random.Random(seed).shuffle(widths)
    return tuple(widths)
