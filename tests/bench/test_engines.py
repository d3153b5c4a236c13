"""What bench/e2e_speedup.py times, in which order, and how it pairs the times, with engines that only say when."""

import signal
import sys
from types import ModuleType, SimpleNamespace

import pytest

from bench.speed import engines
from bench.speed.engines import engine_options, measure, random_prompts, running_engines, summarise, time_case
from bench.speed.ideal import Case
from pruned_vllm.formats.geometry import ModelGeometry

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


def test_speedups_are_medians_of_neighbouring_runs():
    """The machine halves its speed in the second repeat: pairs do not notice, a ratio of medians would."""
    record = summarise(DECODE, [4.0, 8.0, 6.0], [2.0, 4.0, 2.0], ideal=2.5)
    assert (record["speedup"], record["speedup_q1"], record["speedup_q3"]) == (2.0, 2.0, 2.5)
    assert record["of_ideal"] == 0.8 and record["ideal_speedup"] == 2.5
    assert record["dense"] == {
        "median_latency_s": 6.0,
        "throughput_tokens_per_s": 2 * 4 / 6,  # the first token of each sequence belongs to the prefill
        "samples_s": [4.0, 8.0, 6.0],
    }
    assert summarise(PREFILL, [3.0], [2.0], 1.5)["pruned"]["throughput_tokens_per_s"] == 2 * 3 / 2
    assert summarise(PREFILL, [3.0], [2.0], 1.5)["speedup_q3"] == 1.5
    with pytest.raises(ValueError):
        summarise(DECODE, [1.0, 2.0], [1.0], 2.0)


def test_prompts_are_the_same_for_every_engine():
    prompts = random_prompts(DECODE, 50)
    assert prompts == random_prompts(DECODE, 50) != random_prompts(DECODE, 50, seed=1)
    assert [len(prompt["prompt_token_ids"]) for prompt in prompts] == [3, 3]
    assert all(0 <= token < 50 for prompt in prompts for token in prompt["prompt_token_ids"])


def test_engines_have_room_for_the_largest_case():
    geometry = ModelGeometry.from_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": 64,
            "vocab_size": 100,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 100,
        }
    )
    cases = [Case.parse("decode:8:32:64"), Case.parse("prefill:4:512")]
    options = engine_options(geometry, cases, load_format="dummy", dtype="bfloat16", max_model_len=512, compile=False)
    assert options["max_num_seqs"] == 8 and options["max_num_batched_tokens"] == 4 * 512
    assert options["kv_cache_memory_bytes"] >= 8 * 512 * geometry.kv_cache_bytes_per_token(4)
    assert options["enforce_eager"] and not options["enable_prefix_caching"] and not options["disable_log_stats"]


def test_all_engines_are_shut_down_whatever_happens(fake_vllm):
    log, before = [], signal.getsignal(signal.SIGTERM)

    def llm(model: str, **options):
        if model == "broken":
            raise RuntimeError("does not start")
        core = SimpleNamespace(shutdown=lambda timeout: log.append((model, timeout)))
        return SimpleNamespace(llm_engine=SimpleNamespace(engine_core=core), options=options)

    fake_vllm.LLM, seconds = llm, []
    with pytest.raises(RuntimeError), running_engines(["dense", "broken"], {}):
        pytest.fail("started")
    with pytest.raises(ZeroDivisionError), running_engines(["dense", "pruned"], {"seed": 0}, seconds) as started:
        assert [engine.options for engine in started] == [{"seed": 0}] * 2 and len(seconds) == 2
        assert signal.getsignal(signal.SIGTERM) is engines._exit
        raise ZeroDivisionError
    assert log == [(name, engines.SHUTDOWN_SECONDS) for name in ("dense", "pruned", "dense")]
    assert signal.getsignal(signal.SIGTERM) == before
