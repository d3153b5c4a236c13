"""Keys of config.json that Transformers and vLLM do not read alike, and what is done about each. Pure Python.

What the Hugging Face model computes is right. Where vLLM would compute something else from the same config.json, it
must not get that config.json: a key that Hugging Face's model ignores is left out of what the converter writes, and a
value that vLLM cannot honour is refused, when converting and when serving: agreed_config.py does both.

`tests/serving/test_config_reads.py` reads both sources and fails for a key that only one of them reads and that has no
row here. Then a row is missing: find out what the key does on either side, and choose.
"""

from dataclasses import dataclass
from typing import Any, Literal

from pruned_vllm.formats.families import ACTIVATIONS, FAMILIES
from pruned_vllm.formats.family import Family

ROPE = "rope_parameters."  # prefix of the keys inside of `rope_parameters`, or `rope_scaling` as it was called
LONGROPE = (
    "vLLM rotates all positions by long_factor where --max-model-len is above original_max_position_embeddings, and by "
    "short_factor where it is not; Transformers chooses by the length of the text"
)


@dataclass(frozen=True)
class Row:
    """What is done about some keys.

    Attributes:
        keys: of config.json.
        action:
            "handled": the project reads and checks it, or both sides get it from one place; `why` says which.
            "idle": changes nothing that these models compute when they generate.
            "dropped": vLLM acts on it, Hugging Face's model does not. Left out when writing, refused when serving.
            "refused": any value but `allowed` is refused when converting and when serving.
            "not stock": vLLM's own class does not act on it, the plugin's does. With any value but `allowed` the model
                is written for the plugin.
            "told": both act on it, but not always alike. The user is told `why`, with any value but `allowed`.
        why: what would happen; ends a sentence that begins with the key and its value where it can be refused.
        families: model types; all if empty.
        allowed: values that mean the same on both sides. So does a key that is absent or null, or false where dropped.
    """

    keys: str
    action: Literal["handled", "idle", "dropped", "refused", "not stock", "told"]
    why: str
    families: tuple[str, ...] = ()
    allowed: tuple[Any, ...] = ()

    def holds_for(self, family: Family) -> bool:
        return not self.families or family.model_type in self.families


_DENSE = tuple(name for name, family in FAMILIES.items() if family.experts is None)
_LATENT = tuple(name for name, family in FAMILIES.items() if family.latent_attention)
_GLM = ("glm4_moe",)
_SIGMOID = tuple(name for name, family in FAMILIES.items() if family.experts and family.experts.scoring == "sigmoid")
_ROUTED_LATE = (*_LATENT, *_GLM)  # families whose routers have groups and factors
_WITHOUT_LAYER_TYPES = (
    *("llama", "mistral", "mixtral", "qwen3_moe", "olmoe", "deepseek", "phi3", "ministral3"),
    "granite",
    *_ROUTED_LATE,
)
_SILU = tuple(name for name, family in FAMILIES.items() if family.activation == "silu")
_WITHOUT_BIASES = ("mistral", "phi3", "ministral3")
_LINEAR = tuple(name for name, family in FAMILIES.items() if family.linear_attention is not None)
_QWEN3_5 = ("qwen3_5_text", "qwen3_5_moe_text")
_PARTLY_ROTATED = ("phi3", *_LINEAR, *_GLM)
_VLLM_ONLY = "vLLM acts on it, the Hugging Face model does not"
_LLAMA_LAYER = "the plugin serves them with vLLM's Llama layer, which it tells the biases of the checkpoint"


def _all_but(*model_types: str) -> tuple[str, ...]:
    return tuple(name for name in FAMILIES if name not in model_types)


ROWS = (
    # Sizes and biases.
    Row("hidden_size intermediate_size vocab_size num_hidden_layers", "handled", "ModelGeometry"),
    Row("num_attention_heads num_key_value_heads head_dim per_layer_config", "handled", "ModelGeometry"),
    Row("num_kv_heads n_head_kv num_attention_groups multi_query_group_num", "dropped", _VLLM_ONLY),
    Row("hidden_size_per_head", "dropped", _VLLM_ONLY),
    Row("tie_word_embeddings", "handled", "ModelGeometry; Transformers ties weights outside of its model classes",
        _all_but("qwen3_next")),
    Row("tie_word_embeddings", "not stock", "vLLM's Qwen3-Next always has an lm_head of its own", ("qwen3_next",),
        (False,)),
    Row("attention_bias", "handled", "ModelGeometry",
        ("llama", "granite", "qwen3", "qwen3_moe", "deepseek", "gemma3_text", "gpt_oss", *_GLM)),
    Row("attention_bias", "refused", "vLLM's OLMoE has no such biases", ("olmoe",), (False,)),
    Row("attention_bias", "not stock", "vLLM's own classes have no such biases", _LINEAR, (False,)),
    Row("attention_bias", "refused", "vLLM's latent attention has no biases", _LATENT, (False,)),
    Row("mlp_bias", "refused", "vLLM's DeepSeek-V2 has no such biases", ("deepseek_v2",), (False,)),
    Row("attention_bias mlp_bias", "dropped", _VLLM_ONLY, _WITHOUT_BIASES),
    Row("mlp_bias", "handled", "ModelGeometry", ("llama", "granite")),
    Row("bias qkv_bias", "dropped", _VLLM_ONLY, ("llama", "granite", *_WITHOUT_BIASES)),
    Row("mlp_bias bias", "handled", _LLAMA_LAYER, ("qwen2", "mixtral", "qwen2_moe", "olmoe", "deepseek", "gpt_oss")),
    Row("qkv_bias", "handled", _LLAMA_LAYER, ("qwen2", "mixtral", "olmoe", "deepseek", "gpt_oss")),
    Row("attention_bias", "handled", _LLAMA_LAYER, ("qwen2", "mixtral", "qwen2_moe")),
    Row("qkv_bias", "dropped", _VLLM_ONLY, _LINEAR),
    Row("qkv_bias", "not stock", "vLLM's Qwen2-MoE always has it", ("qwen2_moe",), (True,)),
    # What a layer computes.
    Row("hidden_act", "refused", "vLLM has these models with silu alone", _SILU, ACTIVATIONS["silu"]),
    Row("hidden_activation", "refused", "Gemma 3 has one activation, and the kernels here know no other of its kind",
        ("gemma3_text",), ACTIVATIONS["gelu_tanh"]),
    Row("embedding_multiplier residual_multiplier attention_multiplier logits_scaling", "handled",
        "both sides multiply by them", ("granite",)),
    Row("query_pre_attn_scalar", "handled", "both sides scale queries by it", ("gemma3_text",)),
    Row("final_logit_softcapping", "refused", "Gemma 3 has none, and the plugin caps no logits", ("gemma3_text",)),
    Row("attn_logit_softcapping", "idle", "neither model of Gemma 3 hands it on", ("gemma3_text",)),
    Row("use_bidirectional_attention", "refused", "the plugin serves causal attention alone", ("gemma3_text",),
        (False,)),
    Row("rms_norm_eps", "not stock", "vLLM's own class always takes 1e-5", ("olmoe", "gpt_oss"), (1e-5,)),
    Row("swiglu_alpha", "refused", "vLLM and the kernels here know 1.702 alone", ("gpt_oss",), (1.702,)),
    Row("swiglu_limit", "refused", "vLLM and the kernels here know 7 alone", ("gpt_oss",), (7.0,)),
    Row("clip_qkv", "refused", "vLLM's OLMoE does not clip", ("olmoe",)),
    Row("attn_output_gate", "dropped", _VLLM_ONLY, _LINEAR, (True,)),
    Row("output_gate_type", "dropped", _VLLM_ONLY, _LINEAR, ACTIVATIONS["silu"]),
    Row("layer_scale", "dropped", _VLLM_ONLY, _LINEAR),
    Row("qk_norm dual_chunk_attention_config", "dropped", _VLLM_ONLY),
    Row("logit_scale", "dropped", _VLLM_ONLY, allowed=(1,)),
    Row("attn_logit_softcapping", "dropped", _VLLM_ONLY, _all_but("gemma3_text")),
    Row("llama_4_scaling", "dropped", _VLLM_ONLY, _all_but("ministral3")),
    Row("llama_4_scaling", "handled", "vLLM's name for what rope_parameters say; see query_scaling", ("ministral3",)),
    Row("ada_rms_norm_t_cond ada_rms_norm_t_cond_dim", "dropped", _VLLM_ONLY),
    Row("is_causal", "refused", "the plugin serves causal attention alone", allowed=(True,)),
    # Which tokens a layer attends to.
    Row("sliding_window layer_types", "handled", "both sides read them",
        ("qwen2", "qwen3", "qwen2_moe", "gemma3_text", "gpt_oss")),
    Row("layer_types", "handled", "ModelGeometry", _LINEAR),
    Row("use_sliding_window", "not stock", "vLLM's own classes have it for all layers or none",
        ("qwen2", "qwen3", "qwen2_moe"), (False,)),
    Row("max_window_layers", "handled", "the config class that both sides use", ("qwen2", "qwen3")),
    Row("sliding_window", "handled", "both sides apply it to all layers",
        ("mistral", "mixtral", "qwen3_moe", "phi3", "ministral3")),
    Row("attention_sinks layer_rope_theta", "dropped", _VLLM_ONLY, ("granite",)),
    Row("sliding_window", "dropped", _VLLM_ONLY, ("llama", "granite", "deepseek", *_LINEAR, *_ROUTED_LATE)),
    Row("sliding_window", "refused", "Hugging Face's OLMoE applies it with some attention kernels only", ("olmoe",)),
    Row("layer_types", "dropped", _VLLM_ONLY, _WITHOUT_LAYER_TYPES),
    Row("attention_chunk_size rswa_window target_layer_count", "dropped", _VLLM_ONLY),
    Row("alibi attn_config position_encoding_type", "dropped", _VLLM_ONLY),
    Row("num_kv_shared_layers", "idle", "only Hugging Face's KV cache reads it, vLLM never"),
    # Experts.
    Row("num_experts num_local_experts n_routed_experts num_experts_per_tok moe_intermediate_size", "handled",
        "ModelGeometry", tuple(set(FAMILIES) - set(_DENSE))),
    Row("num_experts num_local_experts n_routed_experts num_experts_per_tok", "dropped", _VLLM_ONLY, _DENSE),
    Row("moe_num_experts num_experts_per_token top_k_experts moe_topk moe_top_k", "dropped", _VLLM_ONLY),
    Row("mlp_only_layers decoder_sparse_step", "handled", "ModelGeometry"),
    Row("n_shared_experts first_k_dense_replace", "handled", "ModelGeometry", ("deepseek", *_ROUTED_LATE)),
    Row("moe_layer_freq", "handled", "ModelGeometry", ("deepseek",)),
    Row("moe_layer_freq", "refused", "Hugging Face's model has experts in every layer behind the dense ones",
        _ROUTED_LATE, (1,)),
    Row("mlp_layer_types", "handled", "ModelGeometry; vLLM gets it as first_k_dense_replace", ("glm4_moe_lite",)),
    Row("shared_expert_intermediate_size", "handled", "ModelGeometry",
        ("qwen2_moe", "qwen3_next", "qwen3_5_moe_text")),
    Row("shared_expert_intermediate_size", "dropped", _VLLM_ONLY, ("qwen3_moe",)),
    Row("norm_topk_prob", "handled", "ModelGeometry; Mixtral has no such key",
        ("qwen2_moe", "qwen3_moe", "mixtral", "deepseek", "qwen3_next", *_SIGMOID)),
    Row("norm_topk_prob", "dropped", _VLLM_ONLY, ("qwen3_5_moe_text",), (True,)),
    Row("moe_intermediate_size shared_expert_intermediate_size norm_topk_prob", "idle", "read for experts, which "
        "this one of its kind has not", ("qwen3_5_text",)),
    Row("norm_topk_prob", "refused", "Hugging Face's DeepSeek-V2 never divides by the sum", ("deepseek_v2",), (False,)),
    Row("norm_topk_prob", "not stock", "vLLM's OLMoE never divides by the sum", ("olmoe",), (False,)),
    Row("scoring_func", "refused", "the published code knows softmax alone", ("deepseek",), ("softmax",)),
    Row("scoring_func", "refused", "Hugging Face's model knows softmax alone", ("deepseek_v2",), ("softmax",)),
    Row("scoring_func", "refused", "Hugging Face's model knows sigmoid alone", _SIGMOID, ("sigmoid",)),
    Row("topk_method", "refused", "Hugging Face's model knows no other", ("deepseek_v2",),
        ("greedy", "group_limited_greedy")),
    Row("topk_method", "refused", "Hugging Face's model knows no other", _SIGMOID, ("noaux_tc",)),
    Row("n_group topk_group routed_scaling_factor", "handled", "ModelGeometry", _ROUTED_LATE),
    Row("n_group topk_group topk_method routed_scaling_factor", "dropped", _VLLM_ONLY, ("deepseek",)),
    Row("moe_router_dtype", "dropped", _VLLM_ONLY, ("deepseek", *_LATENT)),
    # Positions.
    Row("rope_parameters rope_theta max_position_embeddings", "handled", "the config class that both sides use"),
    Row("original_max_position_embeddings", "handled", "the config class that both sides use"),
    Row("partial_rotary_factor", "refused", "the Hugging Face model rotates all of a head",
        _all_but(*_PARTLY_ROTATED), (1,)),
    Row("partial_rotary_factor", "handled", "the config class that both sides use", _PARTLY_ROTATED),
    Row("rotary_emb_base rotary_pct rotary_emb_fraction mrope_section xdrope_section", "dropped", _VLLM_ONLY),
    Row(f"{ROPE}rope_theta {ROPE}type", "handled", "the config class that both sides use"),
    Row(f"{ROPE}rope_type", "refused", "vLLM and Hugging Face compute other angles",
        _all_but("deepseek", "gemma3_text", "phi3", *_ROUTED_LATE), ("default", "linear", "llama3", "yarn")),
    Row(f"{ROPE}rope_type", "refused", "vLLM takes all others for yarn", _LATENT, ("default", "yarn")),
    Row(f"{ROPE}rope_type", "refused", "no GLM has other angles, and others are not compared with vLLM's", _GLM,
        ("default", "yarn")),
    Row(f"{ROPE}rope_type", "refused", "only linear scaling is the same in vLLM and in the published code",
        ("deepseek",), ("default", "linear")),
    Row(f"{ROPE}rope_type", "refused", "no Gemma 3 has other angles, and others are not compared with vLLM's",
        ("gemma3_text",), ("default", "linear")),
    Row(f"{ROPE}rope_type", "refused", "Phi-3 knows the default and longrope alone", ("phi3",),
        ("default", "longrope")),
    Row(f"{ROPE}long_factor", "told", LONGROPE, ("phi3",)),
    Row(f"{ROPE}partial_rotary_factor", "refused", "the Hugging Face model rotates all of a head",
        _all_but(*_PARTLY_ROTATED), (1,)),
    Row(f"{ROPE}partial_rotary_factor", "handled", "both rotate so much of a head", _PARTLY_ROTATED),
    Row(f"{ROPE}mrope_section {ROPE}mrope_interleaved", "handled",
        "a token of text has one position, three times; vLLM's hook for the stock class takes these keys out",
        _QWEN3_5),
    Row(f"{ROPE}mrope_section {ROPE}mrope_interleaved", "dropped", _VLLM_ONLY, _all_but(*_QWEN3_5)),
    Row("rope_interleave", "refused", "vLLM turns neighbours together", ("deepseek_v3", "glm4_moe_lite"), (True,)),
    Row(f"{ROPE}full_attention", "refused", "these models have one kind for all layers: vLLM would take the defaults",
        _all_but("gemma3_text")),
    Row(f"{ROPE}full_attention {ROPE}sliding_attention", "handled", "both sides read them", ("gemma3_text",)),
    Row(f"{ROPE}llama_4_scaling_beta", "handled", "vLLM gets it as llama_4_scaling; see query_scaling",
        ("ministral3",)),
    Row(f"{ROPE}factor", "handled", "both compute the same, see the test of angles", _all_but("phi3")),
    Row(f"{ROPE}attention_factor", "handled", "both compute the same, see the test of angles",
        _all_but("phi3", *_LATENT)),
    Row(f"{ROPE}attention_factor", "refused", "vLLM's DeepSeek reads no other than 1, which changes what it computes",
        _LATENT),
    Row(f"{ROPE}truncate", "handled", "both compute the same, see the test of angles", _all_but(*_LATENT)),
    Row(f"{ROPE}truncate", "refused", "vLLM's DeepSeek always truncates", _LATENT, (True,)),
    Row(f"{ROPE}factor {ROPE}attention_factor", "refused", "vLLM's longrope reads neither", ("phi3",)),
    Row(f"{ROPE}beta_fast {ROPE}beta_slow {ROPE}mscale {ROPE}mscale_all_dim "
        f"{ROPE}low_freq_factor {ROPE}high_freq_factor {ROPE}original_max_position_embeddings",
        "handled", "both compute the same, see the test of angles"),
    Row(f"{ROPE}rope_dim {ROPE}use_fope {ROPE}num_key_value_heads "
        f"{ROPE}num_inv_freq {ROPE}fope_sep_head {ROPE}fope_init_factor", "dropped", _VLLM_ONLY),
    Row(f"{ROPE}short_factor", "handled", "both compute the same, see the test of angles", ("phi3",)),
    Row(f"{ROPE}short_mscale {ROPE}long_mscale", "dropped", _VLLM_ONLY, ("phi3",)),
    Row(f"{ROPE}short_factor {ROPE}long_factor {ROPE}short_mscale {ROPE}long_mscale", "idle",
        "of types that are refused", _all_but("phi3")),
    Row(f"{ROPE}alpha {ROPE}mixed_b {ROPE}max_trained_positions {ROPE}is_deepseek_v4", "idle",
        "of types that are refused"),
    # The rest.
    Row("quantization_config", "handled", "the converter refuses all but MXFP4; the plugin serves what was quantized"),
    Row("compression_config", "refused", "vLLM takes the weights for quantized"),
    Row("is_encoder_decoder", "refused", "these models have no encoder", allowed=(False,)),
    Row("text_config thinker_config encoder_config vision_config", "dropped", _VLLM_ONLY),
    Row("canvas_length is_mm_prefix_lm mm_prefix_clamp_sliding_window mm_prefix_span_leading_pad_modulus", "dropped",
        _VLLM_ONLY),
    Row("projection_dim projection_size", "dropped", _VLLM_ONLY),
    Row("attention_dropout initializer_range router_jitter_noise aux_loss_alpha seq_aux", "idle", "training"),
    Row("resid_pdrop embd_pdrop", "idle", "training", ("phi3",)),
    Row("output_router_logits router_aux_loss_coef", "idle", "training"),
    Row("use_cache pad_token_id bos_token_id eos_token_id", "idle", "generation, which requests to vLLM decide"),
    Row("embedding_size is_matryoshka matryoshka_dimensions use_sep_token use_pad_token position_embedding_type "
        "head_dtype", "idle", "pooling, or asked of vLLM on purpose"),
    Row("model_max_length", "idle", "length of a request"),
    Row("architectures model_type dtype name_or_path is_heterogeneous sub_configs", "handled", "what every config has"),
    Row("attn_type_list block_configs layers_block_type mamba_chunk_size chunk_size number_of_conv_states", "idle",
        "models with other layers than attention"),
    Row("kv_lora_rank q_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim", "handled",
        "LatentAttention", _LATENT),
    Row("use_qk_norm", "handled", "ModelGeometry", _GLM),
    Row("kv_lora_rank q_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim", "idle",
        "read for DeepSeek's later models only", _all_but(*_LATENT)),
    Row("compress_ratios index_topk index_head_dim index_n_heads index_skip_topk_offset index_topk_freq "
        "index_topk_pattern indexer_rope_interleave", "dropped", _VLLM_ONLY, _LATENT),
    Row("compress_ratios index_topk index_head_dim index_n_heads index_skip_topk_offset index_topk_freq "
        "index_topk_pattern indexer_rope_interleave", "idle", "read for DeepSeek's later models only",
        _all_but(*_LATENT)),
    Row("model engram_layer_ids", "idle", "read for DeepSeek's later models only"),
    Row("num_nextn_predict_layers sample_from_anchor dflash_config eagle_config eagle_aux_hidden_state_layer_ids",
        "idle", "draft models"),
    Row("max_source_positions", "idle", "encoders"),
)  # fmt: skip


def rows_of(family: Family) -> dict[str, Row]:
    """The row of each key that has one for this family."""
    return {key: row for row in ROWS if row.holds_for(family) for key in row.keys.split()}
