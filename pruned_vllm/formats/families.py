"""The supported architectures, one row each: what distinguishes them for pruning. Pure Python.

A converted model names its tensors as Llama does (`model.layers.{i}.self_attn.q_proj.weight` ...), so a row holds
only the differences: which biases and norms exist, what the activation is, where experts live, how dense files are
stored where that is otherwise, and which pruned shapes the stock model can say.
Adding an architecture is one row here and one in `pruned_vllm/serving/models.py`.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.experts import ExpertsFormat
from pruned_vllm.formats.family import Family

KV_HEADS_AS_HEADS = (("num_key_value_heads", "num_attention_heads"),)
NORM_EPS_1E_5 = (("rms_norm_eps", 1e-5),)
SHARED_EXPERT_512 = (("shared_expert_intermediate_size", 512),)
# What Qwen3-Next and all after it have in common.
QWEN3_NEXT: dict[str, Any] = {
    "qkv_bias": "attention_bias",
    "o_bias": "attention_bias",
    "qk_norm": "head",
    "output_gate": True,
    "norms_add_one": True,
    "default_head_dim": 256,
}
QWEN_EXPERTS = ExpertsFormat(
    count_keys=("num_experts",),
    layers="sparse_step",
    shared_module="mlp.shared_expert",
    shared_width_key="shared_expert_intermediate_size",
    shared_gate="mlp.shared_expert_gate",
)
DEEPSEEK_EXPERTS = ExpertsFormat(
    count_keys=("n_routed_experts",),
    layers="first_dense",
    shared_module="mlp.shared_experts",
    shared_count_key="n_shared_experts",
)
# With the routers of GLM-4.5 and DeepSeek-V3: sigmoid, a bias where experts are chosen, groups, a factor at last.
SIGMOID_ROUTER = replace(
    DEEPSEEK_EXPERTS,
    scoring="sigmoid",
    correction_bias="e_score_correction_bias",
    grouped=True,
    scaling_key="routed_scaling_factor",
    float32_router=True,
)
# What config.json calls the function; the first name is the one that vLLM knows.
ACTIVATIONS = {"silu": ("silu", "swish"), "gelu_tanh": ("gelu_pytorch_tanh",)}

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            model_type="llama",
            architecture="LlamaForCausalLM",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            mlp_bias="mlp_bias",
            stock_heads="divides_hidden",
            defaults=KV_HEADS_AS_HEADS,
        ),
        Family(  # Granite 3 to 4 without experts and state-space layers
            model_type="granite",
            architecture="GraniteForCausalLM",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            mlp_bias="mlp_bias",
            multipliers=("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"),
            defaults=KV_HEADS_AS_HEADS,
        ),
        Family(model_type="mistral", architecture="MistralForCausalLM"),
        Family(model_type="qwen2", architecture="Qwen2ForCausalLM", qkv_bias=True, stock_heads="fills_hidden"),
        Family(
            model_type="qwen3",
            architecture="Qwen3ForCausalLM",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            qk_norm="head",
            default_head_dim=128,
        ),
        Family(
            model_type="mixtral",
            architecture="MixtralForCausalLM",
            defaults=NORM_EPS_1E_5,
            experts=ExpertsFormat(
                count_keys=("num_local_experts",),
                width_key="intermediate_size",
                module="block_sparse_moe",
                projections=("w1", "w3", "w2"),
                norm_topk_prob=True,
            ),
        ),
        Family(
            model_type="qwen2_moe",
            architecture="Qwen2MoeForCausalLM",
            qkv_bias="qkv_bias",
            stock_heads="fills_hidden",
            defaults=(("qkv_bias", True), ("num_key_value_heads", 16), ("shared_expert_intermediate_size", 5632)),
            experts=QWEN_EXPERTS,
        ),
        Family(
            model_type="qwen3_moe",
            architecture="Qwen3MoeForCausalLM",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            qk_norm="head",
            experts=ExpertsFormat(count_keys=("num_local_experts", "num_experts"), layers="sparse_step"),
        ),
        Family(
            model_type="olmoe",
            architecture="OlmoeForCausalLM",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            qk_norm="all_heads",
            stock_heads="fills_hidden",
            defaults=(*KV_HEADS_AS_HEADS, *NORM_EPS_1E_5),
            experts=ExpertsFormat(count_keys=("num_experts", "num_local_experts"), width_key="intermediate_size"),
        ),
        Family(  # DeepSeekMoE-16B; DeepSeek-V2 and later have another attention
            model_type="deepseek",
            architecture="DeepseekForCausalLM",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            stock_heads="fills_hidden",
            defaults=KV_HEADS_AS_HEADS,
            experts=DEEPSEEK_EXPERTS,
        ),
        Family(  # DeepSeek-V2 and its Lite
            model_type="deepseek_v2",
            architecture="DeepseekV2ForCausalLM",
            latent_attention=True,
            defaults=(
                *KV_HEADS_AS_HEADS,
                *(("first_k_dense_replace", 0), ("n_shared_experts", 2), ("topk_method", "greedy")),
            ),
            experts=replace(SIGMOID_ROUTER, scoring="softmax", correction_bias=None, norm_topk_prob=False),
        ),
        Family(  # DeepSeek-V3 and R1, Moonlight
            model_type="deepseek_v3",
            architecture="DeepseekV3ForCausalLM",
            latent_attention=True,
            defaults=(
                *KV_HEADS_AS_HEADS,
                *(("first_k_dense_replace", 3), ("n_shared_experts", 1), ("n_group", 8), ("topk_group", 4)),
                *(("norm_topk_prob", True), ("routed_scaling_factor", 2.5)),
            ),
            experts=SIGMOID_ROUTER,
        ),
        Family(  # GLM-4.5 to 4.7 and their Air
            model_type="glm4_moe",
            architecture="Glm4MoeForCausalLM",
            qkv_bias="attention_bias",
            qk_norm="head",
            qk_norm_key="use_qk_norm",
            defaults=(
                *(("first_k_dense_replace", 1), ("n_shared_experts", 1), ("norm_topk_prob", True)),
                *NORM_EPS_1E_5,
            ),
            experts=SIGMOID_ROUTER,
        ),
        Family(  # GLM-4.7-Flash
            model_type="glm4_moe_lite",
            architecture="Glm4MoeLiteForCausalLM",
            latent_attention=True,
            defaults=(
                *KV_HEADS_AS_HEADS,
                *(("n_shared_experts", 1), ("norm_topk_prob", True), ("routed_scaling_factor", 1.8)),
                *NORM_EPS_1E_5,
            ),
            experts=replace(SIGMOID_ROUTER, layers="mlp_types"),
        ),
        Family(
            model_type="gemma3_text",
            architecture="Gemma3ForCausalLM",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            qk_norm="head",
            attention_norms=("input_layernorm", "post_attention_layernorm"),
            mlp_norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
            norms_add_one=True,
            activation="gelu_tanh",
            activation_key="hidden_activation",
            query_scale_key="query_pre_attn_scalar",
            scales_embedding=True,
            stock_heads="divides_hidden",
            default_head_dim=256,
            defaults=(
                *(("vocab_size", 262208), ("hidden_size", 2304), ("intermediate_size", 9216)),
                *(("num_hidden_layers", 26), ("num_attention_heads", 8), ("num_key_value_heads", 4)),
                *(("query_pre_attn_scalar", 256), ("tie_word_embeddings", True)),
            ),
        ),
        Family(  # also Phi-4 and Phi-4-mini
            model_type="phi3",
            architecture="Phi3ForCausalLM",
            fused=(
                ("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
                ("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
            ),
            defaults=(*KV_HEADS_AS_HEADS, *NORM_EPS_1E_5),
        ),
        Family(  # also Qwen3.6; inside of multimodal models
            model_type="qwen3_5_text",
            architecture="Qwen3_5ForCausalLM",
            linear_attention="apart",
            **QWEN3_NEXT,
        ),
        Family(
            model_type="qwen3_5_moe_text",
            architecture="Qwen3_5MoeForCausalLM",
            linear_attention="apart",
            **QWEN3_NEXT,
            defaults=SHARED_EXPERT_512,
            experts=replace(QWEN_EXPERTS, layers="all", norm_topk_prob=True, may_be_fused=True),
        ),
        Family(
            model_type="qwen3_next",
            architecture="Qwen3NextForCausalLM",
            linear_attention="joined",
            **QWEN3_NEXT,
            defaults=(*SHARED_EXPERT_512, ("norm_topk_prob", True)),
            experts=QWEN_EXPERTS,
        ),
        Family(
            model_type="ministral3",
            architecture="Ministral3ForCausalLM",
            default_head_dim=128,
            defaults=(
                *(("vocab_size", 131072), ("hidden_size", 4096), ("intermediate_size", 14336)),
                *(("num_hidden_layers", 34), ("num_attention_heads", 32), ("num_key_value_heads", 8)),
                *NORM_EPS_1E_5,
            ),
        ),
        Family(
            model_type="gpt_oss",
            architecture="GptOssForCausalLM",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            sinks=True,
            default_head_dim=64,
            defaults=(
                *(("vocab_size", 201088), ("hidden_size", 2880), ("intermediate_size", 2880)),
                *(("num_hidden_layers", 36), ("num_attention_heads", 64), ("num_key_value_heads", 8)),
                *(("num_local_experts", 128), ("num_experts_per_tok", 4), ("attention_bias", True)),
                *NORM_EPS_1E_5,
            ),
            experts=ExpertsFormat(
                count_keys=("num_local_experts",),
                width_key="intermediate_size",
                norm_topk_prob=True,
                bias=True,
                activation="swigluoai",
                router_name="router",
                router_bias=True,
                fused="interleaved",
            ),
        ),
    )
}


def find_family(config: Mapping[str, Any]) -> Family:
    """The row for a config.json, dense or converted.

    As in Transformers, `model_type` decides: `architectures` may be missing, or spelled as by the first converters
    (LLaMAForCausalLM). What it names must be the causal language model, though: other heads would be lost.

    Raises:
        InputError: the model is not supported.
    """
    architectures, model_type = config.get("architectures") or [], config.get("model_type")
    family = FAMILIES.get(str(model_type))
    supported = ", ".join(row.architecture for row in FAMILIES.values())
    if family is None:
        raise InputError(
            f"architectures {architectures} with model_type {model_type!r} is not supported; supported: {supported}"
        )
    accepted = (family.architecture.lower(), family.pruned_architecture.lower())
    if not isinstance(architectures, list) or any(str(name).lower() not in accepted for name in architectures):
        raise InputError(
            f"architectures {architectures} with model_type {model_type!r} is not supported: it is not the causal "
            f"language model {family.architecture}; supported: {supported}"
        )
    return family
