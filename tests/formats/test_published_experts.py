"""config.json of published models with experts, as convert-pruned reads them, sizes as they are."""

import json

import pytest

from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.agreed_config import left_out, refusals, told
from pruned_vllm.formats.config import converted_config, read_config
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.latent import LatentAttention
from pruned_vllm.formats.layer import LayerGeometry

GLM_AIR = {  # zai-org/GLM-4.5-Air
    "architectures": ["Glm4MoeForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "pad_token_id": 151329,
    "eos_token_id": [151329, 151336, 151338],
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "partial_rotary_factor": 0.5,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "max_position_embeddings": 131072,
    "model_type": "glm4_moe",
    "moe_intermediate_size": 1408,
    "norm_topk_prob": True,
    "num_attention_heads": 96,
    "n_group": 1,
    "topk_group": 1,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.0,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 46,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.54.0",
    "use_cache": True,
    "use_qk_norm": False,
    "vocab_size": 151552,
}
GLM_FLASH = {  # zai-org/GLM-4.7-Flash
    "architectures": ["Glm4MoeLiteForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "pad_token_id": 154820,
    "eos_token_id": [154820, 154827, 154829],
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 10240,
    "max_position_embeddings": 202752,
    "model_type": "glm4_moe_lite",
    "moe_intermediate_size": 1536,
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "num_attention_heads": 20,
    "n_group": 1,
    "topk_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.8,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 47,
    "num_key_value_heads": 20,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 1.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "transformers_version": "5.0.0rc0",
    "q_lora_rank": 768,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "vocab_size": 154880,
}
YARN = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "original_max_position_embeddings": 4096, "type": "yarn"}
CODE = {
    "AutoConfig": "configuration_deepseek.DeepseekV2Config",
    "AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM",
}
V2_LITE = {  # deepseek-ai/DeepSeek-V2-Lite
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": CODE,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 102400,
}
V3 = V2_LITE | {  # deepseek-ai/DeepSeek-V3, whose weights are fp8; masks are for what was made bfloat16 of them
    "architectures": ["DeepseekV3ForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "vocab_size": 129280,
}
MOONLIGHT = V2_LITE | {  # moonshotai/Moonlight-16B-A3B
    "architectures": ["DeepseekV3ForCausalLM"],
    "bos_token_id": 163584,
    "eos_token_id": 163585,
    "intermediate_size": 11264,
    "max_position_embeddings": 8192,
    "model_type": "deepseek_v3",
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "vocab_size": 163840,
}
# config.json, dense layers, billions of parameters, bytes of KV cache a token in bfloat16, attention
PUBLISHED = {
    "GLM-4.5-Air": (GLM_AIR, 1, 106.9, 2 * 46 * 8 * 128 * 2, None),
    "GLM-4.7-Flash": (GLM_FLASH, 1, 29.9, 47 * 576 * 2, LatentAttention(768, 512, 192, 64, 256)),
    "DeepSeek-V2-Lite": (V2_LITE, 1, 15.7, 27 * 576 * 2, LatentAttention(None, 512, 128, 64, 128)),
    "DeepSeek-V3": (V3, 3, 671.0, 61 * 576 * 2, LatentAttention(1536, 512, 128, 64, 128)),
    "Moonlight-16B-A3B": (MOONLIGHT, 1, 16.0, 27 * 576 * 2, LatentAttention(None, 512, 128, 64, 128)),
}


def read(tmp_path, config: dict) -> dict:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return read_config(tmp_path)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read(tmp_path, name):
    config, dense, billions, cache, attention = PUBLISHED[name]
    text = read(tmp_path, config)
    geometry = ModelGeometry.from_config(text)
    assert geometry.is_dense and geometry.latent == attention and geometry.qk_norm is None
    with_experts = [layer.expert_intermediate_sizes for layer in geometry.layers]
    expected = (config["moe_intermediate_size"],) * config["n_routed_experts"]
    assert with_experts == [()] * dense + [expected] * (config["num_hidden_layers"] - dense)
    experts = geometry.dense_experts
    assert experts.shared_intermediate_size == config["n_shared_experts"] * config["moe_intermediate_size"]
    assert experts.norm_topk_prob == config["norm_topk_prob"]
    assert experts.routed_scaling_factor == config["routed_scaling_factor"]
    assert (experts.num_expert_group, experts.topk_group) == (config["n_group"], config["topk_group"])
    assert round(geometry.num_parameters / 1e9, 1) == billions
    assert geometry.kv_cache_bytes_per_token(2) == cache
    assert not refusals(geometry.family, text) and not told(geometry.family, text)


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_written_of_them(tmp_path, name):
    config, *_ = PUBLISHED[name]
    text = read(tmp_path, config)
    geometry = ModelGeometry.from_config(text)
    first, *_, last = geometry.layers
    widths = (0, *(last.expert_width - expert for expert in range(1, 8)), *last.expert_intermediate_sizes[8:])
    ragged = LayerGeometry(last.query_heads_per_kv_head, 0, widths)
    uniform = LayerGeometry((), 0, (17,) * len(widths))
    pruned = LayerGeometry(first.query_heads_per_kv_head, 16), *geometry.layers[1:-2], uniform, ragged
    written = converted_config(geometry.with_layers(pruned), text)
    assert written["architectures"] == [f"Pruned{config['architectures'][0]}"]
    assert ModelGeometry.from_config(written) == geometry.with_layers(pruned)
    assert ModelGeometry.from_config(json.loads(json.dumps(written))).kv_cache_bytes_per_token(2) < PUBLISHED[name][3]
    assert not refusals(geometry.family, written) and not left_out(geometry.family, written)
    assert not written.get("num_nextn_predict_layers")


DAMAGED = {
    "no heads of its own": (V3, {"num_key_value_heads": 64}, "num_key_value_heads is 64, but num_attention_heads 128"),
    "no latent vector": (V2_LITE, {"kv_lora_rank": None}, "kv_lora_rank is None"),
    "no low rank": (V2_LITE, {"q_lora_rank": 0}, "q_lora_rank is 0"),
    "groups": (V3, {"n_group": 7}, "256 experts are not 7 groups"),
    "groups of one": (V3, {"n_group": 256}, "256 experts are not 256 groups .* at least 2"),
    "too many groups": (V3, {"topk_group": 9}, "topk_group is 9: so many of 8 groups"),
    "a factor": (GLM_AIR, {"routed_scaling_factor": -1}, "routed_scaling_factor is -1; it must be a number above 0"),
    "kinds of MLPs": (GLM_FLASH, {"mlp_layer_types": ["dense", 7]}, "must be a list of 'dense' and 'sparse'"),
    "as many kinds as layers": (GLM_FLASH, {"mlp_layer_types": ["dense"]}, "mlp_layer_types has 1 entries"),
    "some heads gone": (
        V2_LITE,
        {"per_layer_config": {"3": {"num_attention_heads": 8, "num_key_value_heads": 8}}},
        "layer 3 has 8 heads, but DeepseekV2ForCausalLM keeps one latent vector of a token for all heads",
    ),
    "groups after experts are gone": (V3, {"per_layer_config": {"5": {"num_experts": 255}}}, "255 experts are not 8"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_configs_are_refused(tmp_path, name):
    config, changes, sentence = DAMAGED[name]
    with pytest.raises(InputError, match=sentence):
        ModelGeometry.from_config(read(tmp_path, config | changes))
