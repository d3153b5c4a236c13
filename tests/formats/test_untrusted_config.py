"""config.json as others write it: null, spellings of architectures, and numbers without measure."""

import json
import time

import pytest
import torch
from helpers.tiny import DENSE_CONFIGS, HF_MOE, tiny_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.config import NULL_IS_ABSENT, read_config
from pruned_vllm.formats.geometry import ModelGeometry

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", *DENSE_CONFIGS, *HF_MOE]
# Transformers splits what a checkpoint stores for each expert into fused parameters; all else has the same shape.
NO_EXPERTS = ".experts."


def config_of(model_type: str, **changes) -> dict:
    model = tiny_model(model_type, 6, 6, 40)
    return json.loads(model.config.to_json_string(use_diff=False)) | {"architectures": [type(model).__name__]} | changes


def outcome(config: dict) -> object:
    """The tensors that a config.json describes, or why it is refused."""
    try:
        return ModelGeometry.from_config(config).tensor_shapes()
    except InputError as error:
        return str(error)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_null_is_absent_for_every_key_of_the_geometry(model_type):
    config = config_of(model_type, per_layer_config={}, pruning={})
    for key in config.keys() - {"q_lora_rank"}:  # there null says something
        absent = {name: value for name, value in config.items() if name != key}
        assert outcome({**config, key: None}) == outcome(absent), key


@pytest.mark.parametrize("model_type", FAMILIES)
def test_null_is_absent_for_every_optional_key(tmp_path, model_type):
    """For the geometry, and in what is handed to Transformers, which computes its own shapes from it."""
    config = config_of(model_type)
    built = []
    for key in sorted(NULL_IS_ABSENT):
        absent = {name: value for name, value in config.items() if name != key}
        read = []
        for changed in (absent, {**config, key: None}):
            (tmp_path / "config.json").write_text(json.dumps(changed))
            read.append(read_config(tmp_path))
        cleaned = read[0]
        assert read[1] == cleaned and outcome({**config, key: None}) == outcome(cleaned), key
        if cleaned in built or isinstance(shapes := outcome(cleaned), str):  # what is refused
            continue
        built.append(cleaned)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type].from_dict(cleaned))
        found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        known = {name: shape for name, shape in found.items() if name in shapes and NO_EXPERTS not in name}
        if key not in ("tie_word_embeddings",):
            assert known == {name: shapes[name] for name in known}, key
        assert len(known) > 10
    assert built


@pytest.mark.parametrize(
    "architectures", [["LlamaForCausalLM"], ["LLaMAForCausalLM"], ["LlamaForCausalLm"], [], None, "absent"]
)
def test_the_model_type_decides(architectures):
    config = config_of("llama", architectures=architectures)
    if architectures == "absent":
        del config["architectures"]
    assert ModelGeometry.from_config(config).family.architecture == "LlamaForCausalLM"


@pytest.mark.parametrize(
    "architectures",
    [
        ["LlamaForSequenceClassification"],
        ["LlamaModel"],
        ["LlamaForCausalLM", "LlamaForTokenClassification"],
        ["LlamaForCausalLMEagle3"],
        ["MistralForCausalLM"],
        "LlamaForCausalLM",
        [None],
        {"LlamaForCausalLM": 1},
    ],
)
def test_another_kind_of_model_is_refused(architectures):
    with pytest.raises(InputError, match="is not the causal language model LlamaForCausalLM"):
        ModelGeometry.from_config(config_of("llama", architectures=architectures))


MOE = "qwen3_moe"
HUGE = {
    "layers": ("llama", {"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000; it must be .* at most 10,000"),
    "heads": ("llama", {"num_attention_heads": 10**12, "num_key_value_heads": 10**12}, "num_attention_heads is"),
    "kv heads": ("llama", {"num_key_value_heads": 10**12}, "num_key_value_heads is 1000000000000"),
    "heads of a layer": (
        "llama",
        {"per_layer_config": {"0": {"num_attention_heads": 10**9, "num_key_value_heads": 10**9}}},
        r"per_layer_config\['0'\]: num_attention_heads is",
    ),
    "experts": (MOE, {"num_local_experts": 10**9}, "num_local_experts is 1000000000"),
    "experts in many layers": (MOE, {"num_local_experts": 9999, "num_hidden_layers": 9999}, "more than 1,000,000"),
    "heads in many layers": (
        "llama",
        {"num_attention_heads": 9999, "num_key_value_heads": 9999, "num_hidden_layers": 9999},
        "more than 1,000,000",
    ),
    "hidden size": ("llama", {"hidden_size": 10**5000}, "hidden_size is a number of more than 30 digits"),
    "negative": ("llama", {"vocab_size": -(10**5000)}, "vocab_size is a number of more than 30 digits"),
    "index": ("llama", {"per_layer_config": {"1" * 5000: {}}}, "not a layer index"),
    "too many": (
        "llama",
        {"per_layer_config": {str(i): None for i in range(10**5)}},
        "has 100,000 layers, the model 3",
    ),
    "index twice": ("llama", {"per_layer_config": {"00": {}}}, "not a layer index"),
    "a long list": (MOE, {"mlp_only_layers": ["x" * 10**6]}, r"mlp_only_layers is \['x+ \.\.\.; it must be a list"),
}


@pytest.mark.parametrize(("model_type", "changes", "message"), HUGE.values(), ids=HUGE)
def test_numbers_without_measure_cost_a_message(model_type, changes, message):
    config, started = config_of(model_type), time.process_time()
    with pytest.raises(InputError, match=message) as error:
        ModelGeometry.from_config(config | changes)
    assert time.process_time() - started < 1 and len(str(error.value)) < 3000


def test_layers_that_are_listed_one_by_one_are_looked_up_fast():
    config, started = config_of(MOE, num_hidden_layers=3000, mlp_only_layers=list(range(10**6))), time.process_time()
    geometry = ModelGeometry.from_config(config)
    assert time.process_time() - started < 1
    assert not any(layer.expert_intermediate_sizes for layer in geometry.layers)
