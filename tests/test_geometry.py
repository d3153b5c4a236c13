"""Geometry: config.json in both directions, sizes against real Hugging Face models."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model
from transformers import AutoConfig

from pruned_vllm.errors import InputError
from pruned_vllm.families import FAMILIES
from pruned_vllm.geometry import LayerGeometry, ModelGeometry

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 96,
    "vocab_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "intermediate_size": 100,
}


def geometry(**changes) -> ModelGeometry:
    return ModelGeometry.from_config(LLAMA | changes)


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_tensors_and_parameters_are_those_of_hugging_face(model_type, tied, biases):
    config = {"attention_bias": True, "mlp_bias": True} if biases else {}
    model = tiny_model(model_type, 6, 3, 100, tie_word_embeddings=tied, **config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if tied:
        del shapes["lm_head.weight"]
    ours = ModelGeometry.from_config(model.config.to_dict() | {"architectures": [type(model).__name__]})
    assert ours.tensor_shapes() == shapes
    assert ours.num_parameters == model.num_parameters()


def test_sizes():
    ours = geometry(
        per_layer_config={"1": {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 7}}
    )
    assert [layer.num_attention_heads for layer in ours.layers] == [6, 2, 6]
    assert [layer.intermediate_size for layer in ours.layers] == [100, 7, 100]
    assert ours.layer_parameters(1) == 4 * 96 * 2 * 16 + 3 * 96 * 7 + 2 * 96
    assert ours.kv_cache_bytes_per_token(2) == 2 * (6 + 2 + 6) * 16 * 2
    assert ours.num_parameters == sum(map(ours.layer_parameters, range(3))) + 96 + 2 * 256 * 96


groups = st.lists(st.integers(1, 5), min_size=0, max_size=6).map(tuple)
layers = st.builds(LayerGeometry, groups, st.integers(0, 300))


@settings(max_examples=300, deadline=None)
@given(st.lists(layers, min_size=1, max_size=6), st.sampled_from(sorted(FAMILIES)))
def test_config_round_trip(its_layers, model_type):
    config = LLAMA | {
        "model_type": model_type,
        "architectures": [FAMILIES[model_type].architecture],
        "num_hidden_layers": len(its_layers),
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 16,
    }
    before = ModelGeometry.from_config(config).with_layers(tuple(its_layers))
    written = before.to_config(config)
    after = ModelGeometry.from_config(written)
    assert after.layers == before.layers
    assert after.tensor_shapes() == before.tensor_shapes()
    if "per_layer_config" in written:  # dense sizes stay at the top level
        assert after == before
        hugging_face = AutoConfig.for_model(**written)
        assert ModelGeometry.from_config(hugging_face.to_dict()) == before


@pytest.mark.parametrize(
    ("model_type", "heads", "architecture"),
    [
        ("llama", 6, "LlamaForCausalLM"),
        ("llama", 4, "LlamaForCausalLM"),
        ("llama", 5, "MistralForCausalLM"),  # 96 % 5 != 0, which LlamaConfig refuses
        ("mistral", 5, "MistralForCausalLM"),
        ("qwen2", 6, "Qwen2ForCausalLM"),
        ("qwen2", 4, "PrunedQwen2ForCausalLM"),  # vLLM's Qwen2 would take 96 / 4 for head_dim
        ("qwen3", 5, "Qwen3ForCausalLM"),
    ],
)
def test_uniform_layers_get_the_stock_architecture(model_type, heads, architecture):
    config = LLAMA | {"model_type": model_type, "architectures": [FAMILIES[model_type].architecture], "head_dim": 16}
    dense = ModelGeometry.from_config(config)
    pruned = dense.with_layers((LayerGeometry((1,) * heads, 50),) * 3)
    written = pruned.to_config(config)
    assert written["architectures"] == [architecture]
    assert ("per_layer_config" in written) == architecture.startswith("Pruned")
    assert ModelGeometry.from_config(written).layers == pruned.layers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "GPT2LMHeadModel.*supported: LlamaForCausalLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"hidden_size": None}, "hidden_size is None; it must be a whole number"),
        ({"intermediate_size": 0}, "intermediate_size is 0"),
        ({"num_key_value_heads": 4}, "num_attention_heads 6 is not a multiple of num_key_value_heads 4"),
        ({"per_layer_config": {"3": {}}}, r"per_layer_config\['3'\]: not a layer index; the model has layers 0 to 2"),
        ({"per_layer_config": {"0": {"sliding_window": 5}}}, r"\['0'\]: unknown keys \['sliding_window'\]"),
        ({"per_layer_config": {"0": {"skip": ["norm"]}}}, r"skip is \['norm'\]"),
        ({"per_layer_config": {"0": {"intermediate_size": -3}}}, r"\['0'\]: intermediate_size is -3"),
        (
            {"per_layer_config": {"0": {"query_heads_per_kv_head": [3, 4], "num_key_value_heads": 2}}},
            r"query_heads_per_kv_head \[3, 4\] must be 2 positive numbers .* add up to 6",
        ),
        (
            {"per_layer_config": {"0": {"query_heads_per_kv_head": [2.5, 3.5], "num_key_value_heads": 2}}},
            r"query_heads_per_kv_head \[2.5, 3.5\] must be 2 positive numbers",
        ),
    ],
)
def test_bad_configs_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        geometry(**changes)


def test_all_problems_are_reported_at_once():
    with pytest.raises(InputError) as error:
        geometry(hidden_size=0, vocab_size="x", per_layer_config={"9": {}, "0": {"intermediate_size": 0}})
    assert len(error.value.problems) == 4
