"""config.json of published models, sizes cut, as convert-pruned reads them: alone, or inside of a multimodal one."""

import json
from copy import deepcopy
from dataclasses import replace

import pytest

from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.agreed_config import agreed_config, lacking, left_out, refusals, told
from pruned_vllm.formats.config import converted_config, read_config
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.layer import LayerGeometry

FACTORS = [1.0 + index / 10 for index in range(12)]
VISION = {"model_type": "siglip_vision_model", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
PIXTRAL = {"model_type": "pixtral", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
GEMMA_1B = {  # google/gemma-3-1b-it
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 32,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 7,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "use_cache": True,
    "vocab_size": 512,
}
GEMMA_4B = {  # google/gemma-3-4b-it, which leaves out most sizes of its language model
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "initializer_range": 0.02,
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 160,
        "intermediate_size": 96,
        "model_type": "gemma3_text",
        "num_hidden_layers": 3,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "vision_config": VISION,
}
PHI_3 = {  # microsoft/Phi-3-mini-4k-instruct
    "_name_or_path": "Phi-3-mini-4k-instruct",
    "architectures": ["Phi3ForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    },
    "bos_token_id": 1,
    "embd_pdrop": 0.0,
    "eos_token_id": 32000,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 4096,
    "model_type": "phi3",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "original_max_position_embeddings": 4096,
    "pad_token_id": 32000,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "attention_bias": False,
    "vocab_size": 512,
}
PHI_4 = PHI_3 | {  # microsoft/phi-4
    "max_position_embeddings": 16384,
    "num_key_value_heads": 2,
    "original_max_position_embeddings": 16384,
    "rope_theta": 250000,
    "sliding_window": None,
}
PHI_4_MINI = PHI_3 | {  # microsoft/Phi-4-mini-instruct
    "full_attn_mod": 1,
    "interpolate_factor": 1,
    "lm_head_bias": False,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.75,
    "rope_scaling": {"long_factor": FACTORS, "short_factor": FACTORS, "type": "longrope"},
    "sliding_window": 262144,
    "tie_word_embeddings": True,
}
MINISTRAL_3B = {  # mistralai/Ministral-3-3B-Base-2512
    "architectures": ["Mistral3ForConditionalGeneration"],
    "dtype": "bfloat16",
    "image_token_index": 10,
    "model_type": "mistral3",
    "multimodal_projector_bias": False,
    "projector_hidden_act": "gelu",
    "spatial_merge_size": 2,
    "text_config": {
        "attention_dropout": 0.0,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 96,
        "initializer_range": 0.02,
        "intermediate_size": 96,
        "max_position_embeddings": 262144,
        "model_type": "ministral3",
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-05,
        "rope_parameters": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 16.0,
            "llama_4_scaling_beta": 0.1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 16384,
            "rope_theta": 1000000.0,
            "rope_type": "yarn",
            "type": "yarn",
        },
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": 512,
    },
    "transformers_version": "5.0.0.dev0",
    "vision_config": PIXTRAL,
    "vision_feature_layer": -1,
}
MISTRAL_SMALL = MINISTRAL_3B | {  # mistralai/Mistral-Small-3.1-24B-Instruct-2503
    "text_config": {
        "attention_dropout": 0.0,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 160,
        "initializer_range": 0.02,
        "intermediate_size": 96,
        "max_position_embeddings": 131072,
        "model_type": "mistral",
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000000.0,
        "sliding_window": None,
        "use_cache": True,
        "vocab_size": 512,
    },
}
LINEAR = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 16,
}
QWEN3_5_4B = {  # like Qwen/Qwen3.5-4B
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "dtype": "bfloat16",
    "image_token_id": 500,
    "model_type": "qwen3_5",
    "text_config": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        "eos_token_id": 501,
        "full_attention_interval": 4,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 160,
        "initializer_range": 0.02,
        "intermediate_size": 96,
        "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
        **LINEAR,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 262144,
        "mlp_only_layers": [],
        "model_type": "qwen3_5_text",
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [2, 1, 1],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
        "use_cache": True,
        "vocab_size": 512,
    },
    "tie_word_embeddings": True,
    "transformers_version": "4.57.0.dev0",
    "video_token_id": 502,
    "vision_config": {"depth": 2, "hidden_size": 64, "model_type": "qwen3_5", "num_heads": 4},
    "vision_start_token_id": 503,
}
MOE = {
    "moe_intermediate_size": 96,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 80,
}
QWEN3_5_35B = QWEN3_5_4B | {  # like Qwen/Qwen3.5-35B-A3B
    "architectures": ["Qwen3_5MoeForConditionalGeneration"],
    "model_type": "qwen3_5_moe",
    "text_config": {
        **{key: value for key, value in QWEN3_5_4B["text_config"].items() if key != "intermediate_size"},
        **MOE,
        "model_type": "qwen3_5_moe_text",
        "tie_word_embeddings": False,
    },
    "tie_word_embeddings": False,
}
QWEN3_NEXT = {  # Qwen/Qwen3-Next-80B-A3B-Instruct, which has no layer_types
    "architectures": ["Qwen3NextForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "full_attention_interval": 4,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 160,
    "initializer_range": 0.02,
    "intermediate_size": 112,
    **LINEAR,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "model_type": "qwen3_next",
    **MOE,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.0.dev0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 512,
}
GRANITE_2B = {  # like ibm-granite/granite-3.3-2b-instruct
    "architectures": ["GraniteForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_multiplier": 0.015625,
    "embedding_multiplier": 12.0,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "logits_scaling": 8.0,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "granite",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "residual_multiplier": 0.22,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 512,
}
GPT_OSS_20B = {  # openai/gpt-oss-20b
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 4,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "quantization_config": {
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.55.0.dev0",
    "use_cache": True,
    "vocab_size": 512,
}
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
