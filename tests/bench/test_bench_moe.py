"""The benchmarks of models with experts: shapes that bench.scale writes, and one small run of bench.ragged_moe."""

import json

import pytest
import torch
from helpers.quantized_moe import with_codes
from helpers.ragged_moe import Inputs

from bench.experts import timing as moe_timing
from bench.experts.contestants import Contestant, RandomExperts
from bench.experts.layers import Layer, converted_layers, drawn_layers
from bench.experts.quantized import SCHEMES, quantize
from bench.ragged_moe import measure
from bench.scale import read_pattern, scale_model
from bench.speed.widths import beta_shares, quantiles, widths_of
from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.config import converted_config
from pruned_vllm.formats.geometry import ModelGeometry

SMALL = {
    "hidden_size": 64,
    "vocab_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 100,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 50,
    "shared_expert_intermediate_size": 100,
}
LARGE = {
    "hidden_size": 512,
    "vocab_size": 1000,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 1000,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 200,
}
EXPERTS = [[50, 0, 25, 5], [50, 50, 40, 50]]


def small_config(model_type: str, architecture: str, per_layer: dict, **more) -> dict:
    return SMALL | {"model_type": model_type, "architectures": [architecture], "per_layer_config": per_layer} | more


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("model_type, name", [("qwen3_moe", "Qwen3Moe"), ("qwen2_moe", "Qwen2Moe")])
def test_experts_keep_the_shares_of_a_small_model(model_type, name):
    per_layer = {str(index): {"expert_intermediate_sizes": widths} for index, widths in enumerate(EXPERTS)}
    per_layer["0"] |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = small_config(model_type, f"Pruned{name}ForCausalLM", per_layer)
    dense, pruned = map(ModelGeometry.from_config, scale_model(config, LARGE))
    assert dense.is_dense and dense.experts.num_experts == 8 and dense.experts.num_experts_per_tok == 3
    assert dense.experts.shared_intermediate_size == (400 if model_type == "qwen2_moe" else 0)
    assert [layer.num_attention_heads for layer in pruned.layers] == [4, 4, 8, 8]
    # A large layer has two experts for one of the small one: a quarter and three quarters of the way to the next.
    first, _, _, last = [sorted(layer.expert_intermediate_sizes) for layer in pruned.layers]
    assert first == [0, 5, 15, 40, 80, 125, 175, 200]
    assert last == [160, 170, 190, 200, 200, 200, 200, 200]
    assert pruned.layers[0] != pruned.layers[1], "the order of widths is drawn for each layer"


def test_layers_keep_the_share_of_experts_of_a_small_model():
    """Three of four, and two of four, but never fewer than a token is sent to."""
    per_layer = {"0": {"num_experts": 3, "expert_intermediate_sizes": [50, 10, 0]}, "1": {"num_experts": 2}}
    config = small_config("mixtral", "PrunedMixtralForCausalLM", per_layer, intermediate_size=50)
    del config["num_experts"]
    written = converted_config(ModelGeometry.from_config(config), config)
    assert written["num_experts"] == 4
    dense, pruned = map(ModelGeometry.from_config, scale_model(written, LARGE | {"num_experts_per_tok": 5}))
    assert dense.experts.num_experts == 8
    assert [len(layer.expert_intermediate_sizes) for layer in pruned.layers] == [6, 6, 5, 5]


def test_layers_take_after_layers_of_their_kind():
    config = small_config(
        "deepseek",
        "PrunedDeepseekForCausalLM",
        {"0": {"intermediate_size": 30}, "1": {"moe_intermediate_size": 10}},
        n_shared_experts=2,
        first_k_dense_replace=1,
    )
    dense, pruned = map(ModelGeometry.from_config, scale_model(config, LARGE, align=16))
    assert dense.experts.shared_intermediate_size == 400
    assert [layer.intermediate_size for layer in pruned.layers] == [304, 400, 400, 400], "shared experts stay"
    assert [layer.expert_width for layer in pruned.layers] == [0, 32, 32, 32]


def test_a_layer_without_counterpart_is_refused():
    config = small_config(
        "qwen3_moe", "PrunedQwen3MoeForCausalLM", {"0": {"moe_intermediate_size": 9}}, mlp_only_layers=[3]
    )
    with pytest.raises(InputError, match="layer 3 of the large model has a dense MLP"):
        scale_model(config, LARGE)


def test_a_pattern_without_a_model(tmp_path):
    dense_config, config = scale_model(read_pattern("beta:0.5"), LARGE | {"moe_intermediate_size": 512}, align=32)
    geometry = ModelGeometry.from_config(config)
    assert dense_config["architectures"] == ["Qwen3MoeForCausalLM"]
    assert config["architectures"] == ["PrunedQwen3MoeForCausalLM"]
    for layer in geometry.layers:
        assert sum(layer.expert_intermediate_sizes) == pytest.approx(8 * 256, rel=0.05)
        assert max(layer.expert_intermediate_sizes) > 400 and layer.num_attention_heads == 8
    (tmp_path / "config.json").write_text(json.dumps(config))
    layers = list(converted_layers(tmp_path, scale=1))
    assert [layer.widths for layer in layers] == [layer.expert_intermediate_sizes for layer in geometry.layers]
    assert {(layer.hidden_size, layer.top_k, layer.full_width) for layer in layers} == {(512, 3, 512)}
    for wrong in ("beta:", "beta:x", "beta:0", "beta:1", "beta:nan"):
        with pytest.raises(InputError, match="mean share"):
            read_pattern(wrong)


@pytest.mark.parametrize("keep", [0.8, 0.6, 0.5, 0.4])
def test_drawn_widths_keep_the_wanted_share(keep):
    for layer in drawn_layers(["qwen3-30b-a3b", "deepseek-moe-16b"], [keep], scale=1):
        assert layer.kept == pytest.approx(keep, rel=0.01)
        assert max(layer.widths) > 0.85 * layer.full_width and min(layer.widths) < 0.4 * layer.full_width
    assert quantiles(beta_shares(keep, 16), 16) == beta_shares(keep, 16)
    assert sum(beta_shares(keep, 1000)) / 1000 == pytest.approx(keep, rel=1e-3)
    assert sorted(widths_of([0, 0.01, 0.5, 1], 100, align=32)) == [0, 32, 64, 96]


def test_contestants_agree_and_are_timed(one_thread, monkeypatch, capsys):
    monkeypatch.setattr(moe_timing, "SHORT_CASE_SECONDS", 0)
    widths = (64, 7, 0, 33, 20, 1, 40, 30)
    (record,) = measure([Layer("tiny", 64, 2, 96, widths)], [1, 20], repeats=2, device="cpu")
    assert [case["tokens"] for case in record["cases"]] == [1, 20]
    contestants = record["cases"][1]["contestants"]
    assert list(contestants) == ["ragged", "dense, same kernel", "dense", "widest"]
    assert all(len(times["samples_s"]) == 2 and times["median_s"] > 0 for times in contestants.values())
    assert contestants["dense"]["ideal_speedup"] == 8 * 96 / sum(widths)
    assert contestants["widest"]["ideal_speedup"] == 8 * 64 / sum(widths)
    assert "20 tokens | ragged" in capsys.readouterr().out


def test_quantized_contestants_are_compared_with_the_dense_layer(one_thread, monkeypatch):
    monkeypatch.setattr(moe_timing, "SHORT_CASE_SECONDS", 0)
    widths = (64, 7, 0, 33, 20, 1, 40, 30)
    layer = Layer("tiny", 64, 2, 96, widths)
    (record,) = measure([layer], [1, 20], repeats=1, device="cpu", schemes=list(SCHEMES))
    names = [f"ragged {name}" for name in SCHEMES]
    contestants = record["cases"][1]["contestants"]
    assert list(contestants) == ["ragged", *names, "dense, same kernel", "dense", "widest"]
    dense, rows, with_channels = 8 * 96 * 3 * 64 * 2, sum(widths), 7
    scales_of_rows = 4 * (2 * rows + with_channels * 64)
    scales_of_groups = 4 * (2 * rows * 2 + (2 + 1 + 0 + 2 + 1 + 1 + 2 + 1) * 64)
    for name, read in {
        "int8": 3 * rows * 64 + scales_of_rows,
        "fp8": 3 * rows * 64 + scales_of_rows,
        "int4": 3 * rows * 64 // 2 + scales_of_groups,
    }.items():
        quantized = contestants[f"ragged {name}"]
        assert quantized["ideal_speedup"] == pytest.approx(dense / read)
        dense_s, quantized_s = contestants["dense"]["samples_s"][0], quantized["samples_s"][0]
        assert quantized["speedup_over_dense"] == pytest.approx(dense_s / quantized_s)


@pytest.mark.parametrize("group_size, limits", [(None, {"int8": 0.006, "fp8": 0.04}), (128, {"int4": 0.09})])
def test_weights_are_rounded_to_the_nearest_codes(group_size, limits):
    """Integers are off by half of 1/127 or 1/7 of the largest that shares a scale, floats by half of 32/448."""
    experts = RandomExperts(Layer("tiny", 256, 2, 160, (160, 7, 0)), "cpu")
    gate_up, down, offsets = experts.rows((160, 7, 0))
    for name, limit in limits.items():
        *codes, scales = quantize(gate_up, down, offsets, SCHEMES[name])
        assert scales.group_size == group_size
        _, _, exact = with_codes(_inputs(gate_up, down, offsets), *codes, scales)
        assert (exact.gate_up - gate_up.double()).abs().max() <= limit * gate_up.abs().max()
        assert (exact.down - down.double()).abs().max() <= limit * down.abs().max()


def _inputs(gate_up: torch.Tensor, down: torch.Tensor, offsets: list[int]) -> Inputs:
    nothing = torch.empty(0)
    return Inputs(nothing, gate_up, down, torch.tensor(offsets), nothing, nothing, 0)


def test_contestants_that_disagree_are_refused(one_thread, monkeypatch):
    monkeypatch.setattr(Contestant, "tolerance", -1)
    with pytest.raises(InputError, match="'dense, same kernel' and 'dense' differ"):
        list(measure([Layer("tiny", 64, 2, 96, (64, 7))], [1], repeats=1, device="cpu"))
