"""A breakdown of a step: its parts add up, operators have the right name, and what is lost is what the ideal lacks."""

from types import SimpleNamespace

import pytest
import torch

from bench import breakdown
from bench.breakdown import (
    ENGINE,
    PYTHON,
    ROWS,
    case_record,
    contestant_record,
    narrow_config,
    notes,
    record_case,
    table,
    verdict,
)
from bench.speed import profile
from bench.speed.profile import OTHER, PARTS, Recorder, operator_seconds, part_of
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.ideal import Case

DECODE, PREFILL = Case.parse("decode:2:3:5"), Case.parse("prefill:2:3")


class RMSNorm(torch.nn.Module):
    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True))


class SiluAndMul(torch.nn.Module):
    def forward(self, x):
        return torch.sigmoid(x) * x


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = RMSNorm(), SiluAndMul()
        self.weight = torch.nn.Parameter(torch.ones(8, 8))

    def forward(self, x):
        return self.act(torch.nn.functional.linear(self.norm(x), self.weight)).cumsum(0)

    def compute_logits(self, x):
        return torch.nn.functional.linear(x, self.weight)


class Runner:
    """A model runner as vLLM's, as far as its phases go; one phase of vLLM's is missing."""

    def __init__(self) -> None:
        self.model, self.device = Model(), torch.device("cpu")

    def execute_model(self, batch):
        self._prepare_inputs(batch)
        self._build_attention_metadata()
        return self.model.compute_logits(self._model_forward(torch.ones(batch.total_num_scheduled_tokens, 8)))

    def _prepare_inputs(self, batch):
        torch.zeros(4).add(1)

    def _build_attention_metadata(self):
        pass

    def _model_forward(self, x):
        return self.model(x)

    def sample_tokens(self, grammar):
        return self._sample()

    def _sample(self):
        torch.ones(4).argmax()


def run_steps(runner: Runner, *tokens: int) -> None:
    with torch.inference_mode():
        for count in tokens:
            runner.execute_model(SimpleNamespace(total_num_scheduled_tokens=count))
            runner.sample_tokens(None)


def test_phases_of_a_step_add_up_to_the_workers_time(monkeypatch):
    """On a clock that moves by one with every look at it: each phase lasts as many ticks as looks lie within."""
    now = iter(range(10_000))
    monkeypatch.setattr(profile.time, "perf_counter", lambda: float(next(now)))
    runner = Runner()
    recorder = Recorder(runner)
    run_steps(runner, 6, 2)
    steps = recorder.stop()
    assert [step["tokens"] for step in steps] == [6, 2]
    for step in steps:
        phases = step["phases"]
        assert phases == {
            # Four phases with two looks each lie inside of execute_model, one of them in sample_tokens.
            **{"input preparation": 1, "attention metadata": 1, "forward": 1, "logits": 1, "sampler": 1},
            "rest of the worker": 5 + 2,
        }
    assert sum(map(sum, (step["phases"].values() for step in steps))) == 2 * (9 + 3)


def test_a_recorder_leaves_nothing_behind():
    runner = Runner()
    recorder = Recorder(runner, profile=True)
    run_steps(runner, 2)
    recorder.stop()
    assert set(vars(runner)) == {"model", "device"}
    assert runner.model.compute_logits.__func__ is Model.compute_logits
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in runner.model.modules())
    assert not any("_breakdown_scope" in vars(module) for module in runner.model.modules())


def test_operators_are_found_by_phase_and_part():
    runner = Runner()
    recorder = Recorder(runner, profile=True, skip=1)
    run_steps(runner, 6, *[2] * (profile.PROFILED_STEPS + 1))
    prefill, *profiled, after = recorder.stop()
    assert "ops" not in prefill and "ops" not in after and all("ops" in step for step in profiled)
    for step in profiled:
        assert set(step["ops"]) == {"forward", "logits", "input preparation"}
        assert set(step["ops"]["forward"]) == {"norms", "activation", "GEMMs", OTHER}
        assert set(step["ops"]["logits"]) == {"GEMMs"}
        forward = step["ops"]["forward"]
        assert sum(sum(seconds.values()) for seconds in forward.values()) < step["phases"]["forward"]
        assert "aten::rsqrt" in forward["norms"] and "aten::cumsum" in forward[OTHER]


def test_an_operator_belongs_to_its_own_name_or_else_to_the_module_around_it():
    def event(name, parent=None, seconds=1.0):
        return SimpleNamespace(name=name, cpu_parent=parent, self_cpu_time_total=seconds * 1e6)

    step = event("step 3")
    forward = event("phase forward", step)
    norm, attention = event("module RMSNorm", forward), event("module Attention", forward)
    linear = event("aten::linear", event("module ColumnParallelLinear", forward), 0.5)
    events = [step, forward, norm, attention, linear, linear.cpu_parent]
    events += [event("aten::mul", norm), event("_C::rms_norm", forward), event("aten::view", attention, 0.25)]
    events += [event("_C::cpu_attn_reshape_and_cache", attention), event("aten::cat", forward)]
    events += [event("aten::mm", linear), event("aten::add"), event("aten::add", step)]
    compiled = event("## Call CompiledFxGraph fmoexbmm ##", event("Torch-Compiled Region: 0/0", forward), 9)
    events += [compiled, compiled.cpu_parent, event("graph_0_cpp_fused_add_rsqrt_3", compiled, 0.5)]
    events += [event("aten::copy_", compiled, 0.5)]
    assert operator_seconds(events, "cpu") == {
        3: {
            "forward": {
                "norms": {"aten::mul": 1.0, "_C::rms_norm": 1.0, "graph_0_cpp_fused_add_rsqrt_3": 0.5},
                "attention op": {"aten::view": 0.25},
                "KV-cache update": {"_C::cpu_attn_reshape_and_cache": 1.0},
                "GEMMs": {"aten::linear": 0.5, "aten::mm": 1.0},
                # In no module; what is in no step or no phase does not count.
                OTHER: {"aten::cat": 1.0, "aten::copy_": 0.5},
            }
        }
    }


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("_C::onednn_mm", "GEMMs"),
        ("_C::weight_packed_linear", "GEMMs"),
        ("aten::mm", "GEMMs"),
        ("QKVParallelLinear", "GEMMs"),
        ("_C::cpu_attention_with_kv_cache", "attention op"),
        ("vllm::unified_attention_with_output", "attention op"),
        ("Attention", "attention op"),
        ("LlamaAttention", None),  # holds projections, too
        ("_C::cpu_attn_reshape_and_cache", "KV-cache update"),
        ("vllm::unified_kv_cache_update", "KV-cache update"),
        ("graph_0_cpp_fused_add_mean_mul_pow_rsqrt_4", "norms"),
        ("_C::fused_add_rms_norm", "norms"),
        ("graph_0_cpp_fused__to_copy_add_embedding_mean_mul_onednn_mm_pow_rsqrt_0", "norms"),
        ("graph_0_cpp_fused_mul_onednn_mm_silu_slice_3", "activation"),
        ("graph_0_cpp_fused_add_index_select_mul_split_split_with_sizes_sub_unsqueeze_view_1", "rotary"),
        ("triton_red_fused_add_mean_mul_pow_rsqrt_0", "norms"),
        ("graph_0_cpp_fused_moe_copy_2", None),
        ("_C::rotary_embedding", "rotary"),
        ("VocabParallelEmbedding", "embedding"),
        ("_C::cpu_fused_moe", "experts"),
        ("pruned_vllm::ragged_moe", "experts"),
        ("aten::copy_", None),
    ],
)
def test_names_of_vllm_and_inductor_are_known(name, part):
    assert part_of(name) == part


def steps(count: int, scale: float = 1.0, ops: dict | None = None) -> list[dict]:
    phases = {"forward": 6.0, "logits": 2.0, "sampler": 0.5, "attention metadata": 0.25, "rest of the worker": 0.25}
    step = {"tokens": 2, "phases": {name: seconds * scale for name, seconds in phases.items()}}
    return [step | ({"ops": ops} if ops else {}) for _ in range(count)]


OPS = {
    "forward": {"GEMMs": {"onednn_mm": 2.0, "mm": 1.0}, "norms": {"rms_norm": 1.0}},
    "logits": {"GEMMs": {"mm": 1.5}},
    "sampler": {OTHER: {"argmax": 9.0}},
}


def test_parts_add_up_to_the_step_of_the_fastest_run():
    runs = [(56.0, steps(4, scale=1.2)), (48.0, steps(4)), (4000.0, steps(4, scale=100))]
    disturbed = {"forward": {"GEMMs": {"onednn_mm": 200.0}}}
    profiled = [(100.0, steps(8, scale=50, ops=disturbed)), (60.0, steps(8, scale=1.5, ops=OPS) + steps(4))]
    found = contestant_record(DECODE, runs, profiled)
    assert found["step_s"] == 12.0 and found["samples_s"] == [14.0, 12.0, 1000.0]
    parts = found["parts_s"]
    assert {name: seconds for name, seconds in parts.items() if seconds} == {
        **{"GEMMs": 4.5, "norms": 1.0, "sampler": 0.5, "attention metadata": 0.25, "rest of the worker": 0.25},
        PYTHON: 8.0 - 5.5,
        ENGINE: 12.0 - 9.0,
    }
    assert sum(parts.values()) == found["step_s"] and set(parts) == set(ROWS)
    assert found["profiled_forward_over_timed"] == 1.5
    assert found["operators_s"] == {"GEMMs": {"mm": 2.5, "onednn_mm": 2.0}, "norms": {"rms_norm": 1.0}}
    assert list(found["operators_s"]["GEMMs"]) == ["mm", "onednn_mm"], "the slowest first"


def contestant(step: float, gemms: float) -> dict:
    parts = dict.fromkeys(ROWS, 0.0) | {"GEMMs": gemms, "norms": 0.5, PYTHON: step - gemms - 0.5}
    return {"step_s": step, "samples_s": [step, step], "parts_s": parts, "profiled_forward_over_timed": 1.0}


def test_what_is_lost_is_what_lacks_to_the_ideal():
    contestants = {"dense": contestant(10, 8), "pruned": contestant(6, 4.5), "narrow": contestant(2, 0.5)}
    found = case_record(DECODE, contestants, ideal=2.0)
    assert found["speedup"] == 10 / 6 and found["of_ideal"] == pytest.approx(10 / 12)
    lost = {row: seconds for row, seconds in found["lost_s"].items() if seconds}
    assert lost == {"GEMMs": 0.5, "norms": 0.25, PYTHON: 0.25}
    assert sum(lost.values()) == 6 - 10 / 2
    assert sum(found["fixed_s"].values()) == 2 * (1 - 1 / 2)
    assert verdict(found) == (
        "decode:2:3:5: 1.67x, 0.83 of 2.00x; 1000.00 ms a step are lost, 1000.00 to costs that do not depend on "
        "widths: GEMMs 500.00, norms 250.00, Python and dispatch 250.00"
    )
    assert list(table(found).columns[0].cells) == ["GEMMs", "norms", PYTHON, "step"]
    assert "nothing is lost" in verdict(case_record(DECODE, contestants | {"pruned": contestant(4, 3)}, ideal=2.0))


def test_what_the_profiler_cannot_explain_and_noise_are_said():
    contestants = {"dense": contestant(10, 9.9), "pruned": contestant(6, 4.5), "narrow": contestant(2, 0.5)}
    contestants["narrow"]["samples_s"] = [1.9, 2.0, 3.0]
    unexplained, noisy = notes(case_record(DECODE, contestants, ideal=2.0))
    assert "dense: 4.0% of the step unexplained" in unexplained and "narrow: steps of one run took 50%" in noisy


@pytest.mark.parametrize(("case", "timed"), [(DECODE, [2, 2, 2, 2]), (PREFILL, [6])])
def test_only_steps_that_are_timed_count(case, timed, monkeypatch):
    """Of decode the prefill does not, and no step without tokens; every engine is profiled once, after all is timed."""
    log = []

    def engine(name):
        def collective_rpc(method, args=()):
            log.append((name, method, *args))
            return [[{"tokens": tokens, "phases": {"forward": 1.0}, "ops": {}} for tokens in (6, 2, 2, 2, 2, 0)]]

        def collective_rpc_prefill(method, args=()):
            return [collective_rpc(method, args)[0][:1]]

        return SimpleNamespace(collective_rpc=collective_rpc if case is DECODE else collective_rpc_prefill)

    seen = {}
    monkeypatch.setattr(breakdown, "time_case", lambda engine, case, prompts: 8.0)
    monkeypatch.setattr(breakdown, "contestant_record", lambda case, runs, profiled: seen.setdefault("runs", runs))
    record_case({name: engine(name) for name in ("dense", "pruned")}, case, 50, repeats=2)
    assert [[step["tokens"] for step in steps] for _, steps in seen["runs"]] == [timed] * 2
    skip = 1 if case is DECODE else 0
    started = [(name, *options) for name, method, *options in log if method == "probe_record"]
    one, other = [[(name, profiled, skip) for profiled in (False, True)] for name in ("pruned", "dense")]
    assert started == [*one, *other, *other, *one, *one, *other], "they turn round, and the first two warm up"


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_attention_heads": 14, "hidden_size": 896},
        {
            **{"model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"], "num_attention_heads": 4},
            **{"hidden_size": 256, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96},
            "shared_expert_intermediate_size": 128,
        },
    ],
    ids=lambda config: config["model_type"],
)
def test_the_narrow_model_keeps_layers_and_experts_but_no_width(config):
    config = {"vocab_size": 500, "num_hidden_layers": 3, "num_key_value_heads": 2, "intermediate_size": 300, **config}
    dense, narrow = ModelGeometry.from_config(config), ModelGeometry.from_config(narrow_config(config))
    assert len(narrow.layers) == 3 and narrow.head_dim == dense.head_dim == 64 and narrow.vocab_size == 500
    for layer, wide in zip(narrow.layers, dense.layers, strict=True):
        assert layer.num_attention_heads == 1
        assert len(layer.expert_intermediate_sizes) == len(wide.expert_intermediate_sizes)
        assert {layer.intermediate_size, *layer.expert_intermediate_sizes} <= {0, breakdown.NARROW}
    if dense.experts:
        assert narrow.experts.shared_intermediate_size == breakdown.NARROW


def test_every_part_has_a_row():
    assert set(PARTS) < set(ROWS) and len(set(ROWS)) == len(ROWS)
