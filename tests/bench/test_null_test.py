"""The null test's verdicts on machines whose noise is known, and the delay that it puts into an engine."""

import random
from types import SimpleNamespace

import pytest

from bench.speed import null_test
from bench.speed.null_test import SLOWDOWN, shown, verdict
from bench.speed.worker import Probe
from pruned_vllm.formats.ideal import Case

CASE = Case.parse("decode:1:32:64")


def times(slower: float = 1.0, noise: float = 0.01, repeats: int = 7, seed: int = 0) -> list[list[float]]:
    """Seconds of two engines, the second `slower` than the first, on a machine that sometimes halves its speed."""
    chance = random.Random(seed)
    weather = [chance.choice([1, 1, 2]) for _ in range(repeats)]
    return [[factor * now * (1 + chance.gauss(0, noise)) for now in weather] for factor in (1.0, slower)]


def test_a_machine_that_tells_a_tenth_from_nothing_passes():
    found = verdict(CASE, times(), times(1 + SLOWDOWN, seed=1))
    assert found["passed"] and not found["problems"] and found["name"] == CASE.name
    assert found["equal"]["speedup_low"] <= 1 <= found["equal"]["speedup_high"]
    assert found["slowed"]["speedup"] == pytest.approx(1 / 1.1, abs=0.01)
    assert found["slowed"]["expected"] == pytest.approx(1 / 1.1)


@pytest.mark.parametrize(
    ("equal", "slowed", "words"),
    [
        (times(1.05), times(1.15), ["come out as different"]),
        (times(), times(1.0), ["does not come out as slower"]),
        (times(noise=0.3), times(1.1, noise=0.3), ["spans", "does not come out as slower"]),
        (times(noise=0.3), times(1.1), ["which could hide 10%"]),
        ([[1.0] * 7, [1.0, 1.0, 1.0, 0.951, 1.05, 0.95, 1.052]], times(1.1), ["spans 10.2%, which could hide 10%"]),
        (times(0.9), times(0.9), ["come out as different", "does not come out as slower"]),
        (times(repeats=1), times(1.1, repeats=1), ["choose more --repeats"]),
    ],
    ids=["engines differ", "no slowdown", "noise", "noise in the first", "a little too wide", "faster", "one repeat"],
)
def test_a_machine_that_does_not_is_told_why(equal, slowed, words):
    found = verdict(CASE, equal, slowed)
    assert not found["passed"] and len(found["problems"]) == len(words)
    assert all(word in problem for word, problem in zip(words, found["problems"], strict=True))


def test_one_repeat_is_shown_without_an_interval():
    found = verdict(CASE, [[2.0], [1.0]], [[2.0], [1.0]])
    assert shown(found["equal"]) == "2.000x (no interval)"
    assert shown(verdict(CASE, [[2.0] * 7, [1.0] * 7], times(1.1))["equal"]) == "2.000x (2.000 to 2.000)"


def test_the_verdict_counts_rounds_and_not_repeats():
    found = verdict(CASE, times(repeats=6), times(1.1, repeats=6), rounds=2)
    assert found["equal"]["speedup_confidence"] == found["slowed"]["speedup_confidence"] == 0.5


def test_the_second_engine_is_slowed_for_the_second_half_alone(monkeypatch):
    log = []
    engines = [SimpleNamespace(collective_rpc=lambda name, args, i=i: log.append((i, name, *args))) for i in range(2)]

    def measured(engines, cases, vocab_size, repeats):
        log.append("measured")
        return {case: [[float(len(log))], [1.0]] for case in cases}

    monkeypatch.setattr(null_test, "measure", measured)
    found = null_test.measure_equal_and_slowed(engines, [CASE], 50, 7)
    assert log == ["measured", (1, "probe_delay", SLOWDOWN), "measured"]
    assert found == {("equal", CASE): [[1.0], [1.0]], ("slowed", CASE): [[3.0], [1.0]]}


def test_a_delayed_worker_does_the_same_and_waits_for_a_share_of_the_time_that_it_took(monkeypatch):
    """On a clock of its own: a step takes 2 s, and every look at the clock 10 ms."""
    now = [0.0]

    def clock() -> float:
        now[0] += 0.01
        return now[0]

    def execute_model(self, scheduler_output):
        now[0] += 2.0
        return f"ran {scheduler_output}"

    worker = Probe()
    worker.device = SimpleNamespace(type="cpu")
    worker.model_runner = type("Runner", (), {"execute_model": execute_model})()
    monkeypatch.setattr("bench.speed.worker.time.perf_counter", clock)
    worker.probe_delay(0.1)
    worker.probe_delay(0.1)  # no delay of the delay
    assert worker.model_runner.execute_model("a batch") == "ran a batch"
    assert now[0] == pytest.approx(2.2, abs=0.05)
    worker.probe_delay(0)
    started = now[0]
    assert worker.model_runner.execute_model("a batch") == "ran a batch" and now[0] == started + 2
