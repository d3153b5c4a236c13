"""Intervals hold the truth as often as they say; noise and drift are called so; on samples of known distribution."""

import random
from statistics import NormalDist, median

import pytest

from bench.speed import statistics
from bench.speed.statistics import (
    CONFIDENCE,
    drift,
    interval_text,
    median_interval,
    noise_warnings,
    speedup_statistics,
)

SHAPES = {"normal": lambda chance: chance.gauss(0, 1), "skewed": lambda chance: chance.expovariate(1)}
MEDIANS = {"normal": 0.0, "skewed": 0.6931}


def noisy_pairs(speedup: float, noise: float, repeats: int, seed: int = 0) -> tuple[list[float], list[float]]:
    """Times of two contestants on a machine that slows down and recovers, which hits both sides of a pair."""
    chance = random.Random(seed)
    weather = [1 + 0.3 * chance.random() for _ in range(repeats)]
    return tuple([seconds * now * (1 + chance.gauss(0, noise)) for now in weather] for seconds in (speedup, 1.0))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("repeats", "least"), [(5, 0.89), (7, 0.95), (10, 0.91), (20, 0.91)])
def test_intervals_hold_the_truth(shape, repeats, least, monkeypatch):
    """Five values cannot do better than 93.75 %, seven reach 98.4 % here and 88 % by the plain percentile bootstrap."""
    monkeypatch.setattr(statistics, "RESAMPLES", 999)
    chance, trials = random.Random(repeats), 200
    drawn = [[1.5 + 0.03 * SHAPES[shape](chance) for _ in range(repeats)] for _ in range(trials)]
    truth = 1.5 + 0.03 * MEDIANS[shape]
    intervals = [median_interval(values) for values in drawn]
    assert sum(low <= truth <= high for low, high in intervals) / trials >= least
    assert all(low <= median(values) <= high for (low, high), values in zip(intervals, drawn, strict=True))


@pytest.mark.parametrize("rounds", [3, 6])
def test_rounds_cover_what_differs_between_engines(rounds, monkeypatch):
    """Engines differ by 3 % for as long as they live, runs by 0.3 %: without rounds the interval is far too narrow."""
    monkeypatch.setattr(statistics, "RESAMPLES", 999)
    chance, held, held_without = random.Random(rounds), 0, 0
    for _ in range(100):
        engines = [1 + chance.gauss(0, 0.03) for _ in range(rounds)]
        values = [engine + chance.gauss(0, 0.003) for engine in engines for _ in range(5)]
        low, high = median_interval(values, rounds)
        held += low <= 1 <= high
        low, high = median_interval(values[:5])
        held_without += low <= 1 <= high
    assert held / 100 >= {3: 0.65, 6: 0.9}[rounds] and held_without / 100 < 0.3


@pytest.mark.parametrize(("repeats", "rounds"), [(2, 1), (3, 1), (5, 1), (6, 1), (7, 1), (5, 2), (5, 3), (2, 6)])
def test_an_interval_says_how_sure_it_is(repeats, rounds, monkeypatch):
    """What it says is what it holds, in 300 trials: three standard errors are 8 points. Rounds count, not repeats."""
    monkeypatch.setattr(statistics, "RESAMPLES", 999)
    chance, held, trials = random.Random(10 * repeats + rounds), 0, 300
    for _ in range(trials):
        engines = [1 + (chance.gauss(0, 0.03) if rounds > 1 else 0) for _ in range(rounds)]
        values = [engine + chance.gauss(0, 0.001) for engine in engines for _ in range(repeats)]
        found = speedup_statistics(values, [1.0] * len(values), rounds)
        held += found["speedup_low"] <= 1 <= found["speedup_high"]
    said = found["speedup_confidence"]
    assert held / trials == pytest.approx(said, abs=0.08)
    assert (said == CONFIDENCE) == ((rounds if rounds > 1 else repeats) >= 6)
    assert interval_text(found, digits=3).endswith(f", {100 * said:.0f} %") == (said < CONFIDENCE)


def test_more_repeats_narrow_the_interval():
    chance = random.Random(0)
    values = [chance.gauss(1.5, 0.03) for _ in range(60)]
    few, many = (median_interval(values[:count]) for count in (7, 60))
    assert few[1] - few[0] > 2 * (many[1] - many[0])


def test_an_interval_is_the_same_each_time():
    assert median_interval([1.0, 1.1, 1.2, 1.4, 1.3, 1.15]) == median_interval([1.0, 1.1, 1.2, 1.4, 1.3, 1.15])
    assert median_interval([1.0]) is None and median_interval([2.0, 2.0]) == (2.0, 2.0)


def test_speedups_are_those_of_pairs():
    """The machine halves its speed in the second repeat: pairs do not notice, a ratio of medians would."""
    found = speedup_statistics([4.0, 8.0, 6.0], [2.0, 4.0, 2.0])
    assert (found["speedup"], found["speedup_q1"], found["speedup_q3"]) == (2.0, 2.0, 2.5)
    assert (found["speedup_low"], found["speedup_high"]) == (2.0, 3.0)
    single = speedup_statistics([3.0], [2.0])
    assert set(single.values()) == {1.5, None} and single["speedup_low"] is None
    with pytest.raises(ValueError):
        speedup_statistics([1.0, 2.0], [1.0])


def test_equal_contestants_are_found_equal_and_a_tenth_is_found():
    """The null test's verdicts on 40 noisy machines: 1 % of noise in each time, 30 % that both sides share."""
    equal = [speedup_statistics(*noisy_pairs(1.0, 0.01, 7, seed)) for seed in range(40)]
    slowed = [speedup_statistics(*noisy_pairs(1.1, 0.01, 7, seed)) for seed in range(40)]
    assert sum(found["speedup_low"] <= 1 <= found["speedup_high"] for found in equal) >= 37
    assert all(found["speedup_low"] > 1 for found in slowed)
    assert sum(found["speedup_low"] <= 1.1 <= found["speedup_high"] for found in slowed) >= 37


def warnings_of(dense: list[float], pruned: list[float]) -> list[str]:
    return noise_warnings({"dense": dense, "pruned": pruned}, speedup_statistics(dense, pruned))


@pytest.mark.parametrize(("noise", "words"), [(0.002, []), (0.05, ["noisy"])])
def test_noise_is_called_noise(noise, words):
    found = warnings_of(*noisy_pairs(1.5, noise, 7))
    assert [warning.split(":")[0] for warning in found] == words
    assert all("choose more --repeats than gave these 7 pairs" in warning for warning in found)


@pytest.mark.parametrize(
    ("dense", "pruned", "drifting"),
    [
        ([2 + 0.05 * i for i in range(8)], [1 + 0.025 * i for i in range(8)], ["times of dense", "times of pruned"]),
        ([2 + 0.03 * i for i in range(8)], [1.0] * 8, ["times of dense", "speedup"]),
        ([2 + 0.005 * i for i in range(8)], [1.0] * 8, []),  # 1.7 %: there, but small
        ([2.0, 2.2, 2.0, 2.2, 2.0, 2.2, 2.0, 2.2], [1.0, 1.1, 1.0, 1.1, 1.0, 1.1, 1.0, 1.1], []),  # up and down
    ],
)
def test_drift_is_called_drift(dense, pruned, drifting):
    found = [warning for warning in warnings_of(dense, pruned) if warning.startswith("drift")]
    assert [warning.removeprefix("drift: ").split(" changed")[0] for warning in found] == drifting


def test_drift_says_how_much():
    rising = drift([1.0, 1.1, 1.2, 1.3, 1.4])
    assert rising.change == pytest.approx(0.4 / 1.2) and rising.p_value < 0.05
    assert drift([1.0, 2.0]).change == 0 and drift([3.0] * 5).p_value == 1


def test_one_repeat_gives_no_interval():
    assert warnings_of([2.0], [1.0]) == ["1 repeat gives no interval: choose more --repeats"]


def test_the_median_of_the_skewed_shape_is_what_the_tests_say():
    assert MEDIANS["normal"] == NormalDist().inv_cdf(0.5)
    chance = random.Random(0)
    assert median(SHAPES["skewed"](chance) for _ in range(20_000)) == pytest.approx(MEDIANS["skewed"], abs=0.02)
