"""Geometry of models with experts: config.json in both directions, sizes against real Hugging Face models."""

import json
from dataclasses import replace

import pytest
from helpers.tiny import HF_MOE, stored_numbers, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.config import converted_config
from pruned_vllm.formats.families import FAMILIES
from pruned_vllm.formats.fused import unfused
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.headers import read_headers
from pruned_vllm.formats.layer import LayerGeometry
from pruned_vllm.serving import deepseek_config
from tests.formats.test_geometry import groups, layers

MOE = {
    "hidden_size": 96,
    "vocab_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "intermediate_size": 100,
    "num_experts_per_tok": 2,
}
MOE_KEYS = {
    "mixtral": {"num_local_experts": 4},
    "olmoe": {"num_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 20},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 24, "mlp_only_layers": [1]},
    "deepseek": {"n_routed_experts": 4, "moe_intermediate_size": 24, "n_shared_experts": 2, "first_k_dense_replace": 1},
}


def moe_config(model_type: str, **changes) -> dict:
    names = {"model_type": model_type, "architectures": [FAMILIES[model_type].architecture]}
    return {**MOE, **names, **MOE_KEYS[model_type], **changes}


SOME_DENSE = {  # keys that give some layers no experts, by what says so
    "all": {},
    "sparse_step": {"mlp_only_layers": [0], "decoder_sparse_step": 2},
    "first_dense": {"first_k_dense_replace": 1},
    "mlp_types": {"mlp_layer_types": ["dense", "sparse", "dense"]},
}


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("model_type", HF_MOE)
def test_tensors_of_experts_are_those_that_hugging_face_saves(tmp_path, model_type, mixed):
    config = {"attention_bias": not FAMILIES[model_type].latent_attention} | SOME_DENSE[
        FAMILIES[model_type].experts.layers
    ]
    model = tiny_model(model_type, 6, 3, 100, **(config if mixed else {}))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    ours = ModelGeometry.from_config(config)
    saved = unfused(config, read_headers(tmp_path))
    assert ours.tensor_shapes() == {name: tuple(tensor.shape) for name, tensor in saved.items()}
    assert ours.num_parameters == stored_numbers(model)
    with_experts = [bool(layer.expert_intermediate_sizes) for layer in ours.layers]
    assert with_experts == [hasattr(layer.mlp, "experts") for layer in model.model.layers]
    assert any(with_experts) and ours.experts.num_experts_per_tok == model.config.num_experts_per_tok


def test_deepseek_layers():
    """The sizes of deepseek-ai/deepseek-moe-16b-base, which has 16.38B parameters."""
    sizes = {
        "vocab_size": 102400,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": None,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "moe_layer_freq": 1,
    }
    ours = ModelGeometry.from_config(moe_config("deepseek", **sizes))
    assert ours.num_parameters == 16_375_728_128
    assert [len(layer.expert_intermediate_sizes) for layer in ours.layers] == [0] + [64] * 27
    assert ours.tensor_shapes()["model.layers.1.mlp.shared_experts.up_proj.weight"] == (2816, 2048)
    assert ours.tensor_shapes()["model.layers.0.mlp.up_proj.weight"] == (10944, 2048)
    other = ModelGeometry.from_config(moe_config("deepseek", moe_layer_freq=2, num_hidden_layers=5))
    assert [bool(layer.expert_intermediate_sizes) for layer in other.layers] == [False, False, True, False, True]


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from(sorted(MOE_KEYS)))
def test_config_round_trip_of_experts(data, model_type):
    config = moe_config(model_type)
    dense = ModelGeometry.from_config(config)
    widths = st.one_of(
        st.lists(st.integers(0, 3) | st.just(24), min_size=2, max_size=4).map(tuple),
        st.builds(lambda width, count: (width,) * count, st.integers(0, 100) | st.just(24), st.integers(2, 4)),
    )
    its_layers = tuple(
        LayerGeometry(data.draw(groups), 0, data.draw(widths)) if layer.expert_intermediate_sizes else data.draw(layers)
        for layer in dense.dense_layers
    )
    its_layers = tuple(replace(layer, constant_experts=data.draw(constants_of(layer))) for layer in its_layers)
    before = dense.with_layers(its_layers)
    written = converted_config(before, config)
    after = ModelGeometry.from_config(written)
    assert after.layers == before.layers
    assert after.tensor_shapes() == before.tensor_shapes()
    if "per_layer_config" in written:
        assert after == before
        deepseek_config.register()
        hugging_face = AutoConfig.for_model(**written)
        assert ModelGeometry.from_config(hugging_face.to_dict()) == before


def constants_of(layer: LayerGeometry) -> st.SearchStrategy[tuple[int, ...]]:
    """Any of the experts without channels."""
    empty = [expert for expert, width in enumerate(layer.expert_intermediate_sizes) if not width]
    return st.lists(st.sampled_from(empty), unique=True).map(sorted).map(tuple) if empty else st.just(())


def test_experts_without_channels_have_no_tensors():
    config = moe_config("qwen2_moe", per_layer_config={"1": {"expert_intermediate_sizes": [0, 7, 0, 24]}})
    ours = ModelGeometry.from_config(config)
    assert ours.layers[1] == LayerGeometry((3,) * 4, 20, (0, 7, 0, 24)) and ours.layers[1].skip == []
    shapes = ours.layer_tensor_shapes(1)
    assert shapes["model.layers.1.mlp.gate.weight"] == (4, 96), "the router still sees every expert"
    assert shapes["model.layers.1.mlp.experts.1.down_proj.weight"] == (96, 7)
    assert not [name for name in shapes if ".experts.0." in name or ".experts.2." in name]


@pytest.mark.parametrize("model_type", MOE_KEYS)
def test_a_layer_may_have_fewer_experts(model_type):
    """Rows of the router and experts; two of them, which are as many as a token is sent to, in the last layer."""
    dense = ModelGeometry.from_config(moe_config(model_type))
    attention, width_key = dense.layers[0].query_heads_per_kv_head, dense.family.experts.width_key
    shared = dense.experts.shared_intermediate_size
    layers = [dense.layers[0], *(LayerGeometry(attention, shared, widths) for widths in ((5, 0, 7), (5,) * 2))]
    if not dense.layers[1].expert_intermediate_sizes:
        layers[1] = dense.layers[1]
    written = converted_config(dense.with_layers(layers), moe_config(model_type))
    assert written["per_layer_config"]["2"] == {"num_experts": 2, width_key: 5}
    assert written["num_experts"] == 4, "Hugging Face wants each key at the top level, too"
    ours = ModelGeometry.from_config(written)
    assert ours.layers == tuple(layers) and ours.experts.num_experts == 4
    shapes = ours.layer_tensor_shapes(2)
    experts = dense.family.experts
    assert shapes[f"model.layers.2.{experts.router}.weight"] == (2, 96)
    assert not [name for name in shapes if f".{experts.module}.experts.2." in name]


def test_fewer_experts_of_the_dense_width_are_said_by_their_number_alone():
    config = moe_config("qwen3_moe", per_layer_config={"2": {"num_experts": 3}})
    ours = ModelGeometry.from_config(config)
    assert ours.layers[2].expert_intermediate_sizes == (24,) * 3 and not ours.is_dense
    assert converted_config(ours, moe_config("qwen3_moe"))["per_layer_config"] == {"2": {"num_experts": 3}}


def test_biases_of_experts(monkeypatch):
    """That of the down projection is what an expert without channels still adds."""
    row = FAMILIES["qwen2_moe"]
    monkeypatch.setitem(FAMILIES, "qwen2_moe", replace(row, experts=replace(row.experts_format, bias=True)))
    config = moe_config("qwen2_moe", per_layer_config={"1": {"expert_intermediate_sizes": [0, 7, 0, 24]}})
    shapes = ModelGeometry.from_config(config).layer_tensor_shapes(1)
    prefix = "model.layers.1.mlp.experts."
    experts = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
    biases = {name: shape for name, shape in experts.items() if name.endswith("bias")}
    widths = {"0": (), "1": (7,), "2": (), "3": (24,)}
    assert biases == {
        **{f"{expert}.{name}_proj.bias": width for expert, width in widths.items() for name in ("gate", "up") if width},
        **{f"{expert}.down_proj.bias": (96,) for expert in widths},
    }
    assert {name[0] for name in experts if name.endswith("weight")} == {"1", "3"}


def test_experts_of_one_width_use_the_key_of_hugging_face():
    dense = ModelGeometry.from_config(moe_config("qwen3_moe"))
    attention = dense.layers[0].query_heads_per_kv_head
    layers = [LayerGeometry(attention, 0, (5,) * 4), dense.layers[1], LayerGeometry(attention, 0, (0,) * 4)]
    written = converted_config(dense.with_layers(layers), moe_config("qwen3_moe"))
    assert written["expert_intermediate_sizes"] is None
    assert written["per_layer_config"] == {
        "0": {"moe_intermediate_size": 5},
        "2": {"expert_intermediate_sizes": [0, 0, 0, 0]},
    }


@pytest.mark.parametrize(("width", "count"), [(5, 4), (24, 3), (5, 2)])
@pytest.mark.parametrize("model_type", MOE_KEYS)
def test_uniform_experts_get_the_stock_architecture(model_type, width, count):
    dense = ModelGeometry.from_config(moe_config(model_type, head_dim=8))
    pruned = dense.with_layers(
        replace(layer, expert_intermediate_sizes=(width,) * count)
        if layer.expert_intermediate_sizes
        else replace(layer, intermediate_size=30)
        for layer in dense.layers
    )
    written = converted_config(pruned, moe_config(model_type, head_dim=8))
    # deepseek's shared experts are a multiple of the experts' width, which would shrink with it.
    assert ("per_layer_config" in written) == (model_type == "deepseek" and width != 24)
    if "per_layer_config" not in written:
        assert [written[key] for key in dense.family.experts.count_keys if key in written] == [count]
    assert ModelGeometry.from_config(written).layers == pruned.layers
    assert ModelGeometry.from_config(written).tensor_shapes() == pruned.tensor_shapes()


def constants_in_layer_0(constants) -> dict:
    return {"per_layer_config": {"0": {"expert_intermediate_sizes": [0, 2, 0, 4], "constant_experts": constants}}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": None}, "num_local_experts is None; it must be a whole number"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5, but there are 4 experts"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size is 0"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ({"mlp_only_layers": 3}, "mlp_only_layers is 3; it must be a list"),
        (
            {"per_layer_config": {"0": {"expert_intermediate_sizes": [1, 2]}}},
            "expert_intermediate_sizes has 2 numbers for 4 experts",
        ),
        ({"per_layer_config": {"0": {"expert_intermediate_sizes": [1, 2, 3, -4]}}}, "whole numbers of at least 0"),
        ({"per_layer_config": {"0": {"intermediate_size": 5}}}, r"unknown keys \['intermediate_size'\]"),
        ({"per_layer_config": {"1": {"moe_intermediate_size": 5}}}, r"unknown keys \['moe_intermediate_size'\]"),
        ({"per_layer_config": {"0": {"skip": ["mlp"]}}}, "a layer with experts may name 'attention'"),
        ({"per_layer_config": {"0": {"num_experts": 0}}}, r"\['0'\]: num_experts is 0; it must be a whole number of"),
        ({"per_layer_config": {"0": {"num_experts": "3"}}}, "num_experts is '3'"),
        ({"per_layer_config": {"0": {"num_experts": 5}}}, "num_experts is 5, but a layer had 4 before pruning"),
        ({"per_layer_config": {"0": {"num_experts": 10**12}}}, "num_experts is 1000000000000"),
        ({"per_layer_config": {"0": {"num_experts": 1}}}, "num_experts is 1, but the router chooses 2"),
        ({"per_layer_config": {"1": {"num_experts": 3}}}, r"unknown keys \['num_experts'\]"),
        ({"per_layer_config": {"0": {"constant_experts": [1]}}}, r"constant_experts is \[1\]; .* those are \[\]"),
        (constants_in_layer_0([1]), "must name experts without channels"),
        (constants_in_layer_0([2, 0]), "in ascending order"),
        (constants_in_layer_0([0, 0]), "in ascending order"),
        (constants_in_layer_0([4]), r"those are \[0, 2\]"),
        (constants_in_layer_0("02"), "must be a list of whole numbers"),
        (
            {"per_layer_config": {"0": {"num_experts": 3, "expert_intermediate_sizes": [1, 2, 3, 4]}}},
            "expert_intermediate_sizes has 4 numbers for 3 experts",
        ),
    ],
)
def test_bad_configs_of_experts_are_refused(changes, message):
    with pytest.raises(InputError, match=message) as error:
        ModelGeometry.from_config(moe_config("qwen3_moe", **changes))
    assert len(error.value.problems) == 1
