"""config.json of published models, sizes cut, as convert-pruned reads them: alone, or inside of a multimodal one."""

import json
from copy import deepcopy
from dataclasses import replace

import pytest
from helpers.published import (
    GEMMA_1B,
    GEMMA_4B,
    GPT_OSS_20B,
    GRANITE_2B,
    MINISTRAL_3B,
    MISTRAL_SMALL,
    PHI_3,
    PHI_4,
    PHI_4_MINI,
    QWEN3_5_4B,
    QWEN3_5_35B,
    QWEN3_NEXT,
)

from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.agreed_config import agreed_config, lacking, left_out, refusals, told
from pruned_vllm.formats.config import converted_config, read_config
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.layer import LayerGeometry

# config.json, architecture, groups of a layer, head_dim, whether lm_head is the embedding, what the user is told
PUBLISHED = {
    "gemma-3-1b-it": (GEMMA_1B, "Gemma3ForCausalLM", (4,), 32, True, ""),
    "gemma-3-4b-it": (GEMMA_4B, "Gemma3ForCausalLM", (2, 2, 2, 2), 256, True, ""),
    "Phi-3-mini-4k-instruct": (PHI_3, "Phi3ForCausalLM", (1, 1, 1, 1), 32, False, ""),
    "phi-4": (PHI_4, "Phi3ForCausalLM", (2, 2), 32, False, ""),
    "Phi-4-mini-instruct": (PHI_4_MINI, "Phi3ForCausalLM", (2, 2), 32, True, "long_factor"),
    "Qwen3.5-4B": (QWEN3_5_4B, "Qwen3_5ForCausalLM", (2, 2), 32, True, ""),
    "Qwen3.5-35B-A3B": (QWEN3_5_35B, "Qwen3_5MoeForCausalLM", (2, 2), 32, False, ""),
    "Qwen3-Next-80B-A3B-Instruct": (QWEN3_NEXT, "Qwen3NextForCausalLM", (2, 2), 32, False, ""),
    "Ministral-3-3B-Base-2512": (MINISTRAL_3B, "Ministral3ForCausalLM", (2, 2), 32, True, ""),
    "Mistral-Small-3.1-24B-Instruct-2503": (MISTRAL_SMALL, "MistralForCausalLM", (2, 2), 32, False, ""),
    "granite-3.3-2b-instruct": (GRANITE_2B, "GraniteForCausalLM", (2, 2), 32, True, ""),
    "gpt-oss-20b": (GPT_OSS_20B, "GptOssForCausalLM", (2, 2), 64, False, ""),
}


def read(tmp_path, config: dict) -> dict:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return read_config(tmp_path)


def one_width(geometry: ModelGeometry, groups: tuple[int, ...], width: int) -> LayerGeometry:
    """A layer whose MLP, or all of whose experts, have `width` channels."""
    experts = geometry.experts
    return LayerGeometry(groups, width) if experts is None else LayerGeometry(groups, 0, (width,) * experts.num_experts)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read(tmp_path, name):
    config, architecture, groups, head_dim, tied, sentence = PUBLISHED[name]
    text = read(tmp_path, config)
    geometry = ModelGeometry.from_config(text)
    family, experts = geometry.family, geometry.experts
    assert family.architecture == architecture and geometry.is_dense
    widths = (96,) if experts is None else (experts.shared_intermediate_size, (96,) * experts.num_experts)
    linear = [] if family.linear_attention is None else [LayerGeometry((), *widths, linear_attention=True)] * 3
    full = LayerGeometry(groups, *widths)
    assert geometry.layers[:4] == ((*linear, full) if linear else (full,) * len(geometry.layers[:4]))
    assert geometry.head_dim == head_dim
    assert geometry.tie_word_embeddings == tied
    assert not refusals(family, text) and [line for line in told(family, text) if sentence not in line] == []
    assert len(told(family, text)) == bool(sentence)
    assert config.get("torch_dtype", config.get("dtype")) == text.get("torch_dtype", text.get("dtype"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_written_of_them_is_a_model_of_text_alone(tmp_path, name):
    config, architecture, *_ = PUBLISHED[name]
    text = read(tmp_path, config)
    geometry = ModelGeometry.from_config(text)
    heads = geometry.layers[3 if geometry.linear_attention else 0]
    widths = {"expert_intermediate_sizes": (3, 0, 96, 1)} if geometry.experts else {"intermediate_size": 17}
    changed = replace(heads, query_heads_per_kv_head=(1, 2), **widths)
    layers = tuple(changed if layer is heads else layer for layer in geometry.layers)
    pruned = geometry.with_layers(layers)
    written = converted_config(pruned, text)
    assert written["architectures"] == [f"Pruned{architecture}"] and "text_config" not in written
    assert ModelGeometry.from_config(written) == pruned
    assert not refusals(geometry.family, written) and not left_out(geometry.family, written)
    assert not lacking(geometry.family, written)


def test_vllm_is_told_how_ministral_scales_queries(tmp_path):
    text = read(tmp_path, MINISTRAL_3B)
    family = ModelGeometry.from_config(text).family
    assert lacking(family, text) == ["llama_4_scaling"]
    scaling = {"original_max_position_embeddings": 16384, "beta": 0.1}
    assert agreed_config(family, text)["llama_4_scaling"] == scaling
    assert refusals(family, text | {"llama_4_scaling": scaling | {"beta": 0.2}})
    del text["rope_parameters"]  # then the config class fills in the same numbers
    assert agreed_config(family, text)["llama_4_scaling"] == scaling
    (problem,) = refusals(family, text | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}})
    assert "rope_parameters lack llama_4_scaling_beta" in problem


def changed(config: dict, **text) -> dict:
    """`config` with other values in its text_config; None removes a key."""
    result = deepcopy(config)
    result["text_config"] = {k: v for k, v in (result["text_config"] | text).items() if v is not None}
    return result


HOSTILE = {
    "no text_config": (GEMMA_4B | {"text_config": None}, "text_config, which describes its language model, is missing"),
    "text_config is a list": (MISTRAL_SMALL | {"text_config": [1]}, r"language model, is \[1\]"),
    "a classifier": (GEMMA_4B | {"architectures": ["Gemma3ForSequenceClassification"]}, "it is not Gemma3ForCond"),
    "architectures is a text": (GEMMA_4B | {"architectures": "Gemma3"}, "it is not Gemma3ForConditionalGeneration"),
    "an unknown language model": (changed(MISTRAL_SMALL, model_type="nemo"), "model_type 'nemo' is not supported"),
    "a size is missing": (changed(MISTRAL_SMALL, hidden_size=None), "hidden_size is None"),
    "a size is a text": (changed(GEMMA_4B, num_hidden_layers="3"), "num_hidden_layers is '3'"),
    "heads that no KV head divides": (PHI_3 | {"num_key_value_heads": 3}, "4 is not a multiple of num_key_value_heads"),
    "more experts for a token than there are": (GPT_OSS_20B | {"num_local_experts": 3}, "but there are 3 experts"),
    "experts by a text": (GPT_OSS_20B | {"num_local_experts": "8"}, "num_local_experts is '8'"),
    "a bias by a text": (GPT_OSS_20B | {"attention_bias": "yes"}, "must be true or false"),
    "tied by a text": (GEMMA_1B | {"tie_word_embeddings": "yes"}, "must be true or false"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_damaged_configs_are_refused(tmp_path, name):
    config, sentence = HOSTILE[name]
    with pytest.raises(InputError, match=sentence):
        ModelGeometry.from_config(read(tmp_path, config))


REFUSED = {
    "another activation": (GEMMA_1B, {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
    "capped logits": (GEMMA_1B, {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
    "bidirectional": (GEMMA_1B, {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    "other angles": (
        GEMMA_1B,
        {"rope_parameters": {"full_attention": {"rope_type": "yarn"}, "sliding_attention": {"rope_type": "default"}}},
        "rope_parameters.rope_type is 'yarn'",
    ),
    "phi with gelu": (PHI_3, {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "phi with yarn": (PHI_3, {"rope_scaling": {"type": "yarn"}}, "rope_parameters.rope_type is 'yarn'"),
    "longrope with a factor": (
        PHI_4_MINI,
        {"rope_scaling": PHI_4_MINI["rope_scaling"] | {"attention_factor": 2.0}},
        "rope_parameters.attention_factor is 2.0",
    ),
    "queries divided by nothing": (GEMMA_1B, {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0; it must be"),
    "queries divided by a text": (GEMMA_1B, {"query_pre_attn_scalar": "256"}, "query_pre_attn_scalar is '256'"),
    "queries scaled by a text": (
        MINISTRAL_3B["text_config"],
        {"rope_parameters": {"llama_4_scaling_beta": "0.1", "original_max_position_embeddings": 16384}},
        "rope_parameters lack llama_4_scaling_beta or original_max_position_embeddings, or they are no numbers",
    ),
    "products of gpt-oss that are clamped elsewhere": (GPT_OSS_20B, {"swiglu_limit": 10.0}, "swiglu_limit is 10.0"),
    "steeper products of gpt-oss": (GPT_OSS_20B, {"swiglu_alpha": 1.0}, "swiglu_alpha is 1.0"),
    "half of a head": (MISTRAL_SMALL["text_config"], {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_two_sides_would_compute_otherwise_is_refused(name):
    config, changes, sentence = REFUSED[name]
    config = config | changes
    problems = refusals(ModelGeometry.from_config(config).family, config)
    assert len(problems) == 1 and problems[0].startswith(sentence)
