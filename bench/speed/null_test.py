"""Can this machine be trusted? A model against itself must come out as fast as itself, and a tenth slower as slower.

Two engines of one model run the cases in turns, as dense and pruned do. Then one of them is slowed: its worker spins
after each step for a tenth of the time that the step took, and the same cases run again. The first speedup must have
1.00 in its 95 % interval, the second must have it outside, on the right side. The first interval must also be narrower
than that tenth: a wide one holds 1.00 whatever the engines do, and proves nothing. So a machine that passes tells 10 %
from nothing, and what its two engines differ by is at most the interval.

One in twenty intervals misses the truth by chance, on the best of machines: with several cases, expect that.
"""

from collections.abc import Mapping, Sequence

from bench.speed.engines import measure
from bench.speed.statistics import interval_text, noise_warnings, speedup_statistics
from pruned_vllm.formats.ideal import Case

SLOWDOWN = 0.1
WIDEST_INTERVAL = SLOWDOWN  # of the speedup of equal engines


def measure_equal_and_slowed(
    engines: Sequence, cases: Sequence[Case], vocab_size: int, repeats: int
) -> dict[tuple[str, Case], list[list[float]]]:
    """Seconds by "equal" or "slowed", case, engine and repeat; `engines` are two of the same model."""
    found = {("equal", case): samples for case, samples in measure(engines, cases, vocab_size, repeats).items()}
    engines[1].collective_rpc("probe_delay", args=(SLOWDOWN,))
    slowed = measure(engines, cases, vocab_size, repeats)
    return found | {("slowed", case): samples for case, samples in slowed.items()}


def verdict(case: Case, equal: Sequence[Sequence[float]], slowed: Sequence[Sequence[float]], rounds: int = 1) -> dict:
    """What null_test.json holds of one case.

    Args:
        equal, slowed: seconds of each repeat of the two engines, before and after the second was slowed.
        rounds: that the samples come from.

    Returns:
        "name", "passed", "problems" (sentences), and under "equal" and "slowed" the statistics of the second engine's
        speed over the first's, the expected speedup, the samples and warnings about noise.
    """
    record: dict = {"name": case.name}
    for name, samples, expected in (("equal", equal, 1.0), ("slowed", slowed, 1 / (1 + SLOWDOWN))):
        first, second = samples
        statistics = speedup_statistics(first, second, rounds)
        warnings = noise_warnings({"first": first, "second": second}, statistics)
        record[name] = {**statistics, "expected": expected, "samples_s": list(samples), "warnings": warnings}
    problems = found_problems(record["equal"], record["slowed"])
    return {**record, "passed": not problems, "problems": problems}


def found_problems(equal: Mapping, slowed: Mapping) -> list[str]:
    if equal["speedup_low"] is None:
        return ["one repeat gives no interval: choose more --repeats"]
    problems = []
    if not equal["speedup_low"] <= 1 <= equal["speedup_high"]:
        problems.append(
            f"two engines of the same model come out as different, {shown(equal)}: take smaller differences for "
            "noise, or choose more --rounds, which start engines anew"
        )
    if (width := (equal["speedup_high"] - equal["speedup_low"]) / equal["speedup"]) >= WIDEST_INTERVAL:
        problems.append(
            f"the interval of two engines of the same model, {shown(equal)}, spans {width:.1%}, which could hide "
            f"{WIDEST_INTERVAL:.0%}: choose more --repeats or a quieter machine"
        )
    if slowed["speedup_high"] >= 1:
        problems.append(
            f"an engine that was made {SLOWDOWN:.0%} slower does not come out as slower, {shown(slowed)}: choose more "
            "--repeats or a quieter machine"
        )
    return problems


def shown(statistics: Mapping) -> str:
    return f"{statistics['speedup']:.3f}x ({interval_text(statistics, digits=3) or 'no interval'})"
