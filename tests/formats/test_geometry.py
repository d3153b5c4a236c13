"""Geometry: config.json in both directions, sizes against real Hugging Face models."""

import pytest
from helpers.tiny import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.config import converted_config
from pruned_vllm.formats.families import FAMILIES
from pruned_vllm.formats.family import Family
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.layer import LayerGeometry
from pruned_vllm.formats.tensors import Shapes

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


DENSE_FAMILIES = [name for name, family in FAMILIES.items() if family.experts is None]


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", DENSE_FAMILIES)
def test_tensors_and_parameters_are_those_of_hugging_face(model_type, tied, biases):
    config = {"attention_bias": True, "mlp_bias": True} if biases else {}
    model = tiny_model(model_type, 6, 3, 100, tie_word_embeddings=tied, **config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if tied:
        del shapes["lm_head.weight"]
    ours = ModelGeometry.from_config(model.config.to_dict() | {"architectures": [type(model).__name__]})
    assert joined(ours.family, ours.tensor_shapes()) == shapes
    assert ours.num_parameters == model.num_parameters()


def joined(family: Family, shapes: Shapes) -> Shapes:
    """Shapes with the parts of fused tensors as Transformers has them: one below the other."""
    for fused, parts in family.fused:
        for layer in range(3):
            names = [f"model.layers.{layer}.{part}.weight" for part in parts]
            stacked = [shapes[name] for name in names]
            shapes = {name: shape for name, shape in shapes.items() if name not in names}
            shapes[f"model.layers.{layer}.{fused}.weight"] = (sum(rows for rows, _ in stacked), stacked[0][1])
    return shapes


def test_sizes():
    ours = geometry(
        per_layer_config={"1": {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 7}}
    )
    assert [layer.num_attention_heads for layer in ours.layers] == [6, 2, 6]
    assert [layer.intermediate_size for layer in ours.layers] == [100, 7, 100]
    assert ours.layer_parameters(1) == 4 * 96 * 2 * 16 + 3 * 96 * 7 + 2 * 96
    assert ours.kv_cache_bytes_per_token(2) == 2 * (6 + 2 + 6) * 16 * 2
    assert ours.num_parameters == sum(map(ours.layer_parameters, range(3))) + 96 + 2 * 256 * 96


@pytest.mark.parametrize("num_layers", [3, 10, 11, 101])
def test_what_transformers_writes_of_a_pruned_model_reads_the_same(num_layers):
    """Transformers pads layer indices with zeros, from eleven layers on."""
    pruned = {str(index): {"intermediate_size": 7 + index} for index in range(num_layers)}
    config = LLAMA | {"num_hidden_layers": num_layers, "head_dim": 16, "per_layer_config": pruned}
    written = AutoConfig.for_model(**config).to_dict() | {"architectures": LLAMA["architectures"]}
    assert all(len(key) == len(str(num_layers - 1)) for key in written["per_layer_config"])
    assert ModelGeometry.from_config(written) == ModelGeometry.from_config(config)


def test_a_layer_that_is_there_twice_is_refused():
    twice = {"1": {"intermediate_size": 7}, "01": {"intermediate_size": 8}}
    with pytest.raises(InputError, match=r"per_layer_config\['01'\]: layer 1 is there twice"):
        geometry(num_hidden_layers=11, per_layer_config=twice)


groups = st.lists(st.integers(1, 5), min_size=0, max_size=6).map(tuple)
layers = st.builds(LayerGeometry, groups, st.integers(0, 300))


@settings(max_examples=300, deadline=None)
@given(st.lists(layers, min_size=1, max_size=6), st.sampled_from(DENSE_FAMILIES))
def test_config_round_trip(its_layers, model_type):
    config = LLAMA | {
        "model_type": model_type,
        "architectures": [FAMILIES[model_type].architecture],
        "num_hidden_layers": len(its_layers),
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "full_attention_interval": 1,  # tests of linear attention are elsewhere
    }
    before = ModelGeometry.from_config(config).with_layers(tuple(its_layers))
    written = converted_config(before, config)
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
        ("llama", 5, "PrunedLlamaForCausalLM"),  # 96 % 5 != 0, which LlamaConfig refuses
        ("mistral", 5, "MistralForCausalLM"),
        ("qwen2", 6, "Qwen2ForCausalLM"),
        ("qwen2", 4, "PrunedQwen2ForCausalLM"),  # vLLM's Qwen2 would take 96 / 4 for head_dim
        ("qwen3", 5, "Qwen3ForCausalLM"),
        ("gemma3_text", 6, "Gemma3ForCausalLM"),
        ("gemma3_text", 5, "PrunedGemma3ForCausalLM"),  # as LlamaConfig
        ("phi3", 6, "PrunedPhi3ForCausalLM"),  # the stock code wants fused tensors
        ("ministral3", 5, "Ministral3ForCausalLM"),
    ],
)
def test_uniform_layers_get_the_stock_architecture(model_type, heads, architecture):
    config = LLAMA | {"model_type": model_type, "architectures": [FAMILIES[model_type].architecture], "head_dim": 16}
    dense = ModelGeometry.from_config(config)
    pruned = dense.with_layers((LayerGeometry((1,) * heads, 50),) * 3)
    written = converted_config(pruned, config)
    assert written["architectures"] == [architecture] and written["model_type"] == model_type
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
        ({"layer_types": ["full_attention"] * 4}, "layer_types has 4 entries, but num_hidden_layers is 3"),
        ({"mlp_layer_types": ["dense"] * 2}, "mlp_layer_types has 2 entries, but num_hidden_layers is 3"),
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


def test_a_skipped_sublayer_whose_bias_is_normalised_is_refused():
    gemma = {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "attention_bias": True}
    per_layer = {"0": {"skip": ["attention", "mlp"]}, "1": {"skip": ["mlp"]}}
    with pytest.raises(InputError) as error:
        geometry(**gemma, per_layer_config=per_layer)
    assert error.value.problems == (
        "layer 0: attention is gone, but its last bias is not zeros once it is normalised, as Gemma3ForCausalLM does; "
        "keep at least one unit of it",
    )
    assert geometry(**gemma | {"attention_bias": False}, per_layer_config=per_layer).layers[0].skip
    assert geometry(attention_bias=True, per_layer_config=per_layer).layers[0].skip


def test_all_problems_are_reported_at_once():
    with pytest.raises(InputError) as error:
        geometry(hidden_size=0, vocab_size="x", per_layer_config={"9": {}, "0": {"intermediate_size": 0}})
    assert len(error.value.problems) == 4
