"""Layers with linear attention in config.json, and what they cost."""

import pytest

from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.config import converted_config
from pruned_vllm.formats.cost import moved_bytes, sequence_flops
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.layer import LayerGeometry

CONFIG = {
    "model_type": "qwen3_5_text",
    "architectures": ["Qwen3_5ForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 100,
    "vocab_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "full_attention_interval": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
}


def geometry(**changes) -> ModelGeometry:
    return ModelGeometry.from_config(CONFIG | changes)


def test_layers_by_interval_and_by_name():
    kinds = [layer.linear_attention for layer in geometry().layers]
    assert kinds == [True, False, True, False]
    types = ["linear_attention" if kind else "full_attention" for kind in kinds]
    assert geometry(layer_types=types, full_attention_interval=4) == geometry()
    assert geometry(full_attention_interval=None) != geometry()  # then it is every fourth


def test_a_pruned_model_goes_through_its_config():
    dense = geometry()
    linear, full = dense.layers[:2]
    layers = (
        LayerGeometry((), 17, linear_attention=True),
        LayerGeometry((1, 2), 33),
        LayerGeometry((), 0, linear_attention=True),
        LayerGeometry((), 5),
    )
    written = converted_config(dense.with_layers(layers), CONFIG)
    assert written["per_layer_config"]["0"] == {"intermediate_size": 17}
    assert written["per_layer_config"]["2"] == {"skip": ["mlp"]}
    assert written["per_layer_config"]["3"] == {"skip": ["attention"], "intermediate_size": 5}
    assert written["num_key_value_heads"] == 4 and ModelGeometry.from_config(written).layers == layers
    assert "linear_attention" not in linear.to_overrides(linear) and full.skip == linear.skip == []


def test_equal_layers_of_both_kinds_are_a_stock_model():
    dense = geometry()
    layers = tuple(
        LayerGeometry(() if layer.linear_attention else (2, 2), 40, linear_attention=layer.linear_attention)
        for layer in dense.layers
    )
    written = converted_config(dense.with_layers(layers), CONFIG)
    assert written["architectures"] == ["Qwen3_5ForCausalLM"] and "per_layer_config" not in written
    assert ModelGeometry.from_config(written).layers == layers


REFUSED = {
    "its attention skipped": ({"0": {"skip": ["attention"]}}, "a layer with linear attention may name 'mlp'"),
    "heads of its own": ({"0": {"num_attention_heads": 2}}, "unknown keys ['num_attention_heads']"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_linear_attention_cannot_lose(name):
    per_layer, sentence = REFUSED[name]
    with pytest.raises(InputError) as error:
        geometry(per_layer_config=per_layer)
    assert sentence in str(error.value)


def test_states_are_constant_and_there_is_no_kv_cache_of_them():
    model = geometry()
    assert model.kv_cache_bytes_per_token(2) == 2 * (2 * 4) * 32 * 2  # two layers of four KV heads
    # Of each of the two others: a 16 x 8 matrix in float32 for each of 4 heads, and 3 tokens of q, k and v.
    assert model.state_bytes_per_sequence(2) == 2 * (4 * 16 * 8 * 4 + (32 + 32 + 32) * 3 * 2)
    step = moved_bytes(model, 1, 10, 2)
    assert moved_bytes(model, 1, 10, 2, moved_states=2) - step == 2 * model.state_bytes_per_sequence(2)
    longer = sequence_flops(model, 1, 1000) - sequence_flops(model, 1, 0)
    assert longer == 2 * 2 * 16 * 32 * 1000  # of full attention alone
    assert geometry(layer_types=["full_attention"] * 4).state_bytes_per_sequence(2) == 0
