"""What bench/e2e_speedup.py times, in which order, and how it pairs the times, with engines that only say when."""

import signal
import sys
from contextlib import contextmanager
from pkgutil import resolve_name
from types import ModuleType, SimpleNamespace

import pytest
from helpers.speed_results import LLAMA_CONFIG

from bench.speed import engines
from bench.speed.engines import (
    engine_options,
    measure,
    measure_in_rounds,
    probe_machine,
    random_prompts,
    running_engines,
    through_plugin,
    time_case,
)
from bench.speed.machine import matmul_shapes
from bench.speed.worker import Probe
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.ideal import Case

GEOMETRY = ModelGeometry.from_config(LLAMA_CONFIG)
DECODE, PREFILL = Case.parse("decode:2:3:5"), Case.parse("prefill:2:3")


def times(scheduled: float, first: float, last: float) -> SimpleNamespace:
    """What vLLM's RequestOutput.metrics says of one sequence, on the engine's clock."""
    return SimpleNamespace(
        queued_ts=scheduled - 50, scheduled_ts=scheduled, first_token_ts=first, last_token_ts=last, arrival_time=1e9
    )


class FakeEngine:
    """A `vllm.LLM` that does nothing; `log` gets what is asked of it, `metrics` are what it says of its sequences."""

    def __init__(self, name: str, log: list, metrics: list | None = None) -> None:
        self.name, self.log, self.metrics = name, log, metrics or [times(0, 1, 2), times(0, 1, 2)]

    def sleep(self, level: int) -> None:
        assert level == 0, "weights stay"
        self.log.append((self.name, "paused"))

    def enqueue(self, prompts, params, use_tqdm: bool) -> None:
        self.log.append((self.name, prompts, params))

    def wake_up(self, tags: list[str]) -> None:
        self.log.append((self.name, tags))

    def wait_for_completion(self, use_tqdm: bool) -> list:
        return [SimpleNamespace(metrics=metrics) for metrics in self.metrics]


@pytest.fixture(autouse=True)
def fake_vllm(monkeypatch):
    """No vLLM, and no second of waiting before every run."""
    vllm = ModuleType("vllm")
    vllm.SamplingParams = lambda **options: options
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setattr(engines.time, "sleep", lambda seconds: None)
    return vllm


def test_decode_lasts_from_the_first_token_of_any_sequence_to_the_last_of_any():
    engine = FakeEngine("dense", [], [times(10, 11, 20), times(10.5, 12, 19)])
    assert time_case(engine, DECODE, []) == 20 - 11


def test_prefill_lasts_from_the_first_scheduling_to_the_first_token_of_the_last_sequence():
    engine = FakeEngine("dense", [], [times(10, 11, 20), times(10.5, 12, 19)])
    assert time_case(engine, PREFILL, []) == 12 - 10


@pytest.mark.parametrize("case, tokens", [(DECODE, 5), (PREFILL, 1)])
def test_a_batch_starts_as_a_whole_and_has_its_full_length(case, tokens, monkeypatch):
    log = []
    monkeypatch.setattr(engines.time, "sleep", lambda seconds: log.append(("waited", seconds)))
    time_case(FakeEngine("dense", log), case, ["prompts"])
    waited, paused, (_, prompts, params), awake = log
    assert waited == ("waited", engines.SETTLE_SECONDS) and engines.SETTLE_SECONDS > 1, "a worker spins for a second"
    assert paused == ("dense", "paused") and prompts == ["prompts"] and awake == ("dense", ["scheduling"])
    assert params == {"temperature": 0, "max_tokens": tokens, "ignore_eos": True, "detokenize": False}


def test_runs_are_interleaved_and_turn_round(monkeypatch):
    log, clock = [], iter(range(100))

    def timed(engine, case, prompts):
        log.append((case.kind, engine))
        assert prompts == random_prompts(case, 50)
        return next(clock)

    monkeypatch.setattr(engines, "time_case", timed)
    samples = measure(["dense", "pruned"], [DECODE, PREFILL], vocab_size=50, repeats=3)
    forth = [("decode", "dense"), ("decode", "pruned"), ("prefill", "dense"), ("prefill", "pruned")]
    back = [("decode", "pruned"), ("decode", "dense"), ("prefill", "pruned"), ("prefill", "dense")]
    assert log == back + forth + back + forth
    # The first four runs warm up. Samples are by engine, whichever ran first.
    assert samples == {DECODE: [[4, 9, 12], [5, 8, 13]], PREFILL: [[6, 11, 14], [7, 10, 15]]}


def test_rounds_start_engines_anew_in_the_opposite_order(monkeypatch):
    log, clock = [], iter(range(100))

    @contextmanager
    def started(options, seconds):
        log.append([engine["model"] for engine in options])
        seconds += [float(engine["model"] == "dense") for engine in options]
        yield [engine["model"] for engine in options]

    def run(names):
        log.append(names)
        return {DECODE: [[next(clock), next(clock)] for _ in names]}

    monkeypatch.setattr(engines, "running_engines", started)
    start_seconds = [], []
    found = measure_in_rounds([{"model": "dense"}, {"model": "pruned"}], 3, run, start_seconds)
    asked = ["dense", "pruned"]
    assert log == [asked, asked, ["pruned", "dense"], asked, asked, asked], "who runs is who was asked for"
    assert found == {DECODE: [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]]}
    assert start_seconds == ([1.0] * 3, [0.0] * 3), "of each engine, whichever started first"


def test_prompts_are_the_same_for_every_engine():
    prompts = random_prompts(DECODE, 50)
    assert prompts == random_prompts(DECODE, 50) != random_prompts(DECODE, 50, seed=1)
    assert [len(prompt["prompt_token_ids"]) for prompt in prompts] == [3, 3]
    assert all(0 <= token < 50 for prompt in prompts for token in prompt["prompt_token_ids"])


def test_the_machine_is_measured_by_an_idle_engine_at_the_models_shapes(monkeypatch):
    log = []
    monkeypatch.setattr(engines.time, "sleep", lambda seconds: log.append(seconds))
    engine = SimpleNamespace(collective_rpc=lambda name, args: log.append((name, args)) or [{"threads": 3}])
    assert probe_machine(engine, GEOMETRY, [PREFILL]) == {"threads": 3}
    assert log == [engines.SETTLE_SECONDS, ("probe_machine", (matmul_shapes(GEOMETRY, [PREFILL]),))]


def test_a_dense_model_goes_through_the_plugin_by_its_architecture():
    assert through_plugin(GEOMETRY) == {"hf_overrides": {"architectures": ["PrunedLlamaForCausalLM"]}}


def test_engines_have_room_for_the_largest_case():
    cases = [Case.parse("decode:8:32:64"), Case.parse("prefill:4:512")]
    options = engine_options(GEOMETRY, cases, load_format="dummy", dtype="bfloat16", max_model_len=512, compile=False)
    assert options["max_num_seqs"] == 8 and options["max_num_batched_tokens"] == 4 * 512
    assert options["kv_cache_memory_bytes"] >= 8 * 512 * GEOMETRY.kv_cache_bytes_per_token(4)
    assert options["enforce_eager"] and not options["enable_prefix_caching"] and not options["disable_log_stats"]
    settings = {"load_format": "dummy", "dtype": "bfloat16", "max_model_len": 512}
    compiled = engine_options(GEOMETRY, cases, **settings, compile=True, num_engines=3)
    assert not compiled["enforce_eager"] and compiled["gpu_memory_utilization"] == pytest.approx(0.3)
    assert resolve_name(compiled["worker_extension_cls"]) is Probe, "vLLM imports it by name"


def test_all_engines_are_shut_down_whatever_happens(fake_vllm):
    log, before = [], signal.getsignal(signal.SIGTERM)

    def llm(model: str, **options):
        if model == "broken":
            raise RuntimeError("does not start")
        core = SimpleNamespace(shutdown=lambda timeout: log.append((model, timeout)))
        return SimpleNamespace(llm_engine=SimpleNamespace(engine_core=core), options=options)

    fake_vllm.LLM, seconds = llm, []
    with pytest.raises(RuntimeError), running_engines([{"model": "dense"}, {"model": "broken"}]):
        pytest.fail("started")
    with (
        pytest.raises(ZeroDivisionError),
        running_engines([{"model": "dense", "seed": 0}, {"model": "pruned", "seed": 1}], seconds) as started,
    ):
        assert [engine.options for engine in started] == [{"seed": 0}, {"seed": 1}] and len(seconds) == 2
        assert signal.getsignal(signal.SIGTERM) is engines._exit
        raise ZeroDivisionError
    assert log == [(name, engines.SHUTDOWN_SECONDS) for name in ("dense", "pruned", "dense")]
    assert signal.getsignal(signal.SIGTERM) == before
