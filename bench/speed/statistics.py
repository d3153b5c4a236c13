"""How sure a measured speedup is: an interval around the median of paired ratios, and warnings about noise.

    statistics = speedup_statistics(dense_seconds, pruned_seconds)     # the keys speedup, speedup_low, speedup_high ...
    warnings = noise_warnings({"dense": dense_seconds, "pruned": pruned_seconds}, statistics)

What is compared ran in turns, so that sample i of one side has sample i of the other for a neighbour. The interval is
a percentile bootstrap of the median (scipy), widened for small samples as in Hesterberg, "What Teachers Should Know
about the Bootstrap" (The American Statistician 69, 2015): of 7 repeats the plain one holds the truth in 88 % of cases.
With fewer than 6 repeats no interval between measured values holds it in 95 %; it is then the whole range, and
`interval_confidence` says in how many cases that holds it: 75 % of those with 3 repeats. Results and reports say so.

With one round it covers what varies from run to run of the same engines. What differs for as long as two engines live
(each got other memory, for example) it covers with several rounds, each with engines of its own. Rounds then count as
repeats do otherwise: two or three say little, and their interval is no 95 % interval either.
`bench/e2e_speedup.py --null-test` shows how much engines differ on a machine.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import median, quantiles
from typing import Any, NamedTuple

CONFIDENCE = 0.95
RESAMPLES = 9999
WIDEST_INTERVAL = 0.05  # of the speedup; a wider interval is called noise
LARGEST_DRIFT = 0.05  # of the median; a larger trend over the repeats is called drift
DRIFT_P_VALUE = 0.05


class Drift(NamedTuple):
    """A trend over the repeats: `change` from the first to the last as a share of the median, and its p-value."""

    change: float
    p_value: float


def interval_confidence(repeats: int, rounds: int = 1) -> float | None:
    """How often an interval of so many values, `repeats` from each round, holds the median; None for a single one.

    The least and the largest of n values miss their median where all n lie on one side of it: in 2 of 2^n cases.
    """
    count = rounds if rounds > 1 else repeats
    return min(CONFIDENCE, 1 - 2.0 ** (1 - count)) if count > 1 else None


def interval_text(statistics: Mapping[str, Any], between: str = " to ", digits: int = 2) -> str:
    """How tables of 95 % intervals show this one: "1.57 to 1.77", or "1.57 to 1.77, 75 %" with fewer than 6 repeats.

    "" where there is none. Results from before 0.2 do not say how sure an interval is; they had enough repeats.
    """
    low, high = statistics.get("speedup_low"), statistics.get("speedup_high")
    if low is None or high is None:
        return ""
    confidence = statistics.get("speedup_confidence") or CONFIDENCE
    note = f", {100 * confidence:.0f} %" if confidence < CONFIDENCE else ""
    return f"{low:.{digits}f}{between}{high:.{digits}f}{note}"


def median_interval(values: Sequence[float], rounds: int = 1) -> tuple[float, float] | None:
    """Where the median lies, with the confidence of `interval_confidence`; the same for the same values. None for a
    single one.

    Args:
        rounds: that the values come from, one after the other, equally many from each. Rounds are then what is drawn
            first, and repeats from them: the interval covers what differs between rounds.
    """
    if len(values) < 2:
        return None
    import numpy
    from scipy import stats

    if min(values) == max(values):
        return values[0], values[0]
    count = rounds if rounds > 1 else len(values)
    tail = stats.norm.cdf(math.sqrt(count / (count - 1)) * stats.t.ppf((1 - CONFIDENCE) / 2, count - 1))
    rng = numpy.random.default_rng(0)
    if rounds == 1:
        interval = stats.bootstrap(
            (values,),
            numpy.median,
            confidence_level=1 - 2 * tail,
            n_resamples=RESAMPLES,
            method="percentile",
            rng=rng,
        ).confidence_interval
        return float(interval.low), float(interval.high)
    by_round = numpy.reshape(values, (rounds, -1))  # scipy's bootstrap knows no rounds
    repeats = by_round.shape[1]
    drawn_rounds = rng.integers(rounds, size=(RESAMPLES, rounds, 1))
    drawn = by_round[drawn_rounds, rng.integers(repeats, size=(RESAMPLES, rounds, repeats))]
    low, high = numpy.quantile(numpy.median(drawn, axis=(1, 2)), [tail, 1 - tail])
    return float(low), float(high)


def ratios(before: Sequence[float], after: Sequence[float]) -> list[float]:
    """Pair by pair. Raises ValueError where one side has more samples."""
    return [first / second for first, second in zip(before, after, strict=True)]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The first quartile, the median and the third; three times the same of a single value."""
    q1, middle, q3 = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    return q1, middle, q3


def speedup_statistics(before: Sequence[float], after: Sequence[float], rounds: int = 1) -> dict[str, Any]:
    """The median of the paired ratios before / after, its quartiles and its 95 % interval.

    Args:
        before, after: seconds of the dense and of the pruned model, in the order in which they ran. For something of
            which more is better (requests per second) pass the pruned model's first.
        rounds: see `median_interval`.

    Returns:
        speedup, speedup_q1, speedup_q3, speedup_low, speedup_high and speedup_confidence, which is 0.95 or less (see
        `interval_confidence`); the last three are None for a single pair.
    """
    paired = ratios(before, after)
    q1, speedup, q3 = quartiles(paired)
    low, high = median_interval(paired, rounds) or (None, None)
    return {
        "speedup": speedup,
        "speedup_q1": q1,
        "speedup_q3": q3,
        "speedup_low": low,
        "speedup_high": high,
        "speedup_confidence": interval_confidence(len(paired) // rounds, rounds) if low is not None else None,
    }


def drift(values: Sequence[float]) -> Drift:
    """The Theil-Sen trend of `values` over their index, with the p-value of Kendall's tau: neither minds outliers."""
    if len(values) < 3 or min(values) == max(values):
        return Drift(0.0, 1.0)
    from scipy import stats

    places = range(len(values))
    slope = stats.theilslopes(values, places).slope
    return Drift(float(slope) * (len(values) - 1) / median(values), float(stats.kendalltau(places, values).pvalue))


def named_warnings(records: Sequence[Mapping[str, Any]], before: str = "") -> list[str]:
    """The warnings of cases or scenarios, each behind `before` and the name of what it is about."""
    return [f"{before}{record['name']}: {warning}" for record in records for warning in record.get("warnings") or []]


def noise_warnings(samples: Mapping[str, Sequence[float]], statistics: Mapping[str, Any]) -> list[str]:
    """What makes this speedup doubtful, with what to do about it; empty where nothing does.

    Args:
        samples: of each contestant by name, the one that others are compared with first.
        statistics: what `speedup_statistics` says of the first two.
    """
    first, second = list(samples)[:2]
    repeats, speedup = len(samples[first]), statistics["speedup"]
    low, high = statistics["speedup_low"], statistics["speedup_high"]
    if low is None:
        return [f"{repeats} repeat gives no interval: choose more --repeats"]
    found = []
    if (width := (high - low) / speedup) > WIDEST_INTERVAL:
        found.append(
            f"noisy: the interval of the speedup spans {width:.1%} of it, more than {WIDEST_INTERVAL:.0%}; stop "
            f"other work on the machine, or choose more --repeats than gave these {repeats} pairs"
        )
    trends = {f"times of {name}": values for name, values in samples.items()}
    trends["speedup"] = ratios(samples[first], samples[second])
    for name, values in trends.items():
        change, p_value = drift(values)
        if abs(change) > LARGEST_DRIFT and p_value < DRIFT_P_VALUE:
            found.append(
                f"drift: {name} changed by {change:+.1%} from the first to the last of {repeats} runs; something "
                "warms up or throttles: wait until the machine is quiet and cool, then repeat"
            )
    return found
