"""Times of requests, as vLLM's benchmark returns them, become the figures of a run; a bad run is an error."""

import argparse
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest

from bench.speed import traffic
from bench.speed.traffic import Scenario, check_answers, drive, goodput_target, parse_counters, run_metrics
from bench.speed.workload import Request
from pruned_vllm.common.errors import InputError

# Three requests of vLLM's `benchmark`; the last asked for one token.
RESULT = {
    "duration": 4.0,
    "completed": 3,
    "failed": 0,
    "request_throughput": 0.75,
    "request_goodput": 0.5,
    "output_throughput": 2.25,
    "total_token_throughput": 9.0,
    "output_lens": [5, 3, 1],
    "latencies": [2.0, 1.0, 0.5],
    "ttfts": [1.0, 0.5, 0.5],
    "itls": [[0.1, 0.2, 0.3, 0.4], [0.2, 0.3], []],
    "errors": ["", "", ""],
}
BEFORE = {"steps": 10, "output_tokens": 100, "preemptions": 1, "queue_s": 2.0}
AFTER = {"steps": 16, "output_tokens": 109, "preemptions": 3, "queue_s": 3.5}
REQUESTS = [Request([1], 1, tokens) for tokens in (5, 3, 1)]
SERVER = SimpleNamespace(log="server.log")


def test_figures_of_a_run():
    run = run_metrics(RESULT, BEFORE, AFTER)
    assert run["requests_per_s"] == 0.75 and run["goodput_requests_per_s"] == 0.5 and run["duration_s"] == 4.0
    assert run["output_tokens_per_s"] == 2.25 and run["total_tokens_per_s"] == 9.0
    assert run["ttft_p50_ms"] == 500 and run["ttft_p90_ms"] == pytest.approx(900)
    # Four tokens in a second, two in half a second; the request of one token has no time per other token.
    assert (run["tpot_p50_ms"], run["tpot_p99_ms"], run["tpot_mean_ms"]) == (250, 250, 250)
    assert run["itl_p50_ms"] == pytest.approx(250) and run["itl_mean_ms"] == pytest.approx(250)
    assert run["e2e_p50_ms"] == 1000 and run["e2e_p99_ms"] == pytest.approx(1980)
    assert (run["steps"], run["mean_batch"], run["preemptions"]) == (6, 1.5, 2)
    assert run["mean_queue_ms"] == 500


def test_answers_of_one_token_have_no_time_between_tokens():
    result = {**RESULT, "output_lens": [1], "latencies": [2.0], "ttfts": [2.0], "itls": [[]]}
    run = run_metrics(result, BEFORE, BEFORE)
    assert run["tpot_p50_ms"] is run["itl_p99_ms"] is run["mean_batch"] is None and run["e2e_p50_ms"] == 2000


def test_a_run_in_which_requests_fail_is_no_result():
    check_answers(RESULT, REQUESTS, SERVER)
    failed = {**RESULT, "failed": 2, "errors": ["", "Traceback ...\nConnectionRefusedError: no\n", "late"]}
    with pytest.raises(InputError, match=r"2 of 3 requests failed \(ConnectionRefusedError: no\); see server.log"):
        check_answers(failed, REQUESTS, SERVER)


def test_every_answer_must_have_the_length_that_was_asked_for():
    with pytest.raises(InputError, match="1 of 3 answers have another length"):
        check_answers({**RESULT, "output_lens": [5, 2, 1]}, REQUESTS, SERVER)


def test_counters_are_summed_up_over_engines():
    text = """# HELP vllm:generation_tokens_total Number of generation tokens processed.
vllm:generation_tokens_total{engine="0",model_name="model"} 4.0
vllm:generation_tokens_total{engine="1",model_name="model"} 1.5e+02
vllm:generation_tokens_created{engine="0",model_name="model"} 1.79e+09
vllm:iteration_tokens_total_count{engine="0",model_name="a} b"} 7.0
vllm:iteration_tokens_total_sum{engine="0",model_name="model"} 70.0
vllm:num_preemptions_total 3
"""
    assert parse_counters(text) == {"steps": 7, "output_tokens": 154, "preemptions": 3, "queue_s": 0}


@pytest.mark.parametrize("text", ["ttft", "ttft:", "ttft:0", "ttft:-1", "ttft:nan", "itl:5", ":5", "ttft:1:2"])
def test_no_goodput_target(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is no target such as ttft:2000"):
        goodput_target(text)


def test_names():
    assert goodput_target("e2el:1500") == ("e2el", 1500.0)
    scenarios = [Scenario("saturation"), Scenario("rate", 0.5), Scenario("concurrency", 4.0)]
    assert [scenario.name for scenario in scenarios] == ["saturation", "rate:0.5", "concurrency:4"]


@pytest.mark.parametrize(
    ("scenario", "rate", "at_once"),
    [
        (Scenario("saturation"), float("inf"), None),
        (Scenario("rate", 2.0), 2.0, None),
        (Scenario("concurrency", 4.0), float("inf"), 4),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_every_run_begins_without_a_prefix_cache_and_asks_for_exact_lengths(scenario, rate, at_once, monkeypatch):
    """What vLLM's benchmark is told, with arrival times that depend on the seed alone."""
    log, told = [], []

    async def benchmark(**options):
        log.append("run")
        told.append((options, float(numpy.random.random())))
        return RESULT

    fakes = {"datasets": SimpleNamespace(SampleRequest=lambda *values, **named: (*values, named["request_id"]))}
    fakes["serve"] = SimpleNamespace(benchmark=benchmark, TaskType=SimpleNamespace(GENERATION="generation"))
    for name, fake in fakes.items():
        monkeypatch.setitem(sys.modules, f"vllm.benchmarks.{name}", fake)
    monkeypatch.setattr(traffic, "reset_prefix_cache", lambda server: log.append("reset"))
    monkeypatch.setattr(traffic, "read_counters", lambda server: log.append("read") or BEFORE)
    server = SimpleNamespace(url="http://x", log="server.log")
    for seed in (3, 3, 4):
        drive(server, REQUESTS, scenario, log=Path(os.devnull), goodput_ms={"ttft": 5.0}, seed=seed)
    assert log == ["reset", "read", "run", "read"] * 3
    (options, first), (_, again), (_, other) = told
    assert first == again != other
    assert (options["request_rate"], options["max_concurrency"], options["burstiness"]) == (rate, at_once, 1.0)
    assert options["ignore_eos"] and not options["num_warmups"] and options["goodput_config_dict"] == {"ttft": 5.0}
    assert options["input_requests"] == [([1], 1, tokens, f"bench-{i}") for i, tokens in enumerate((5, 3, 1))]
