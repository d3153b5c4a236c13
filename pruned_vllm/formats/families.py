"""The supported architectures, one row each: what distinguishes them for pruning. Pure Python.

A converted model names its tensors as Llama does (`model.layers.{i}.self_attn.q_proj.weight` ...), so a row holds
only the differences: which biases and norms exist, what the activation is, where experts live, how dense files are
stored where that is otherwise, and which pruned shapes the stock model can say.
Adding an architecture is one row here and one in `pruned_vllm/serving/models.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.experts import ExpertsFormat
from pruned_vllm.formats.latent import WHY_WHOLE
from pruned_vllm.formats.linear_attention import Projections

PRUNED_PREFIX = "Pruned"  # PrunedLlamaForCausalLM: an architecture that a vLLM without the plugin refuses to load

# Buffers that old checkpoints carry and every loader computes itself.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached")


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        model_type: `model_type` of config.json.
        architecture: the stock name in `architectures`.
        qkv_bias, o_bias, mlp_bias: whether these projections have a bias; a string is the config key that says so
            (absent means False).
        qk_norm: q and k are RMS-normalised, each head by itself ("head": weights `q_norm`, `k_norm` of size [head_dim])
            or all heads of a token together ("all_heads": a weight for each row of the projection).
        output_gate: whether q_proj has, head by head, as many rows again for a gate: its sigmoid multiplies the output
            of that head before o_proj.
        linear_attention: how layers with a gated delta net store it, in a family where only some layers have attention;
            pruned_vllm/formats/linear_attention.py says which.
        qk_norm_key: config key that says whether they are (absent means no); None where they always are.
        latent_attention: whether attention is that of pruned_vllm/formats/latent.py.
        attention_norms, mlp_norms: the norms of a sublayer, modules of the decoder layer. The first is before the
            sublayer, later ones normalise its output before that is added to the hidden states. A sublayer that is
            skipped has none of them.
        norms_add_one: whether norms multiply by 1 + weight in place of the weight.
        activation: of the gated MLP; ACTIVATIONS has the names that config.json gives it.
        activation_key: config key of the activation.
        query_scale_key: config key of the number whose root divides the products of q and k; None means head_dim.
        scales_embedding: whether the output of the embedding is multiplied by the root of hidden_size.
        multipliers: config keys of numbers that embeddings, what a sublayer adds, and products of q and k are
            multiplied by, and that logits are divided by; absent means 1. () in most families.
        sinks: whether each query head has a number, `sinks` of attention [query heads], that its softmax counts as the
            logit of one token more, whose value is zeros.
        fused: projections that the files of a dense model hold as one tensor, and the parts of its rows, as modules of
            a decoder layer. Transformers has such a module, too. A converted model has the parts.
        experts: where the experts are, in a family that has any.
        defaults: config keys that old config.json files leave out, with the values that the stock code takes then. A
            value that is a str is the key whose value it is.
        default_head_dim: head_dim where config.json has none; None means hidden_size // num_attention_heads.
        stock_heads: numbers of attention heads that the stock code accepts when every layer has the same:
            "any"; "divides_hidden" (LlamaConfig refuses others even with an explicit head_dim);
            "fills_hidden" (vLLM's Qwen2 takes hidden_size // num_attention_heads for head_dim).
    """

    model_type: str
    architecture: str
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: Literal["head", "all_heads"] | None = None
    output_gate: bool = False
    linear_attention: Projections | None = None
    qk_norm_key: str | None = None
    latent_attention: bool = False
    attention_norms: tuple[str, ...] = ("input_layernorm",)
    mlp_norms: tuple[str, ...] = ("post_attention_layernorm",)
    norms_add_one: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"
    activation_key: str = "hidden_act"
    query_scale_key: str | None = None
    scales_embedding: bool = False
    multipliers: tuple[str, ...] = ()
    sinks: bool = False
    fused: tuple[tuple[str, tuple[str, ...]], ...] = ()
    experts: ExpertsFormat | None = None
    defaults: tuple[tuple[str, Any], ...] = ()
    default_head_dim: int | None = None
    stock_heads: Literal["any", "divides_hidden", "fills_hidden"] = "any"

    @property
    def pruned_architecture(self) -> str:
        """Name in `architectures` of a converted model; served by the plugin's class of the same name."""
        return PRUNED_PREFIX + self.architecture

    @property
    def experts_format(self) -> ExpertsFormat:
        """`experts`, for code about layers that have some. Raises ValueError in a family without experts."""
        if self.experts is None:
            raise ValueError(f"{self.architecture} has no experts")
        return self.experts

    @property
    def stores_fused(self) -> bool:
        """Whether the files of a dense model, and so the stock code, have tensors that a converted model has not."""
        return bool(self.fused) or (self.experts is not None and self.experts.fused is not None)

    def norms_of(self, sublayer: str) -> tuple[str, ...]:
        """All norms that go with a sublayer ("attention" or "mlp"), also those inside of it."""
        inside = ("self_attn.q_norm", "self_attn.k_norm") if self.qk_norm is not None else ()
        if self.latent_attention:
            inside = ("self_attn.q_a_layernorm", "self_attn.kv_a_layernorm")
        return (*self.attention_norms, *inside) if sublayer == "attention" else self.mlp_norms

    def query_rows(self, head_dim: int) -> int:
        """Rows of q_proj for each query head."""
        return head_dim * (1 + self.output_gate)

    @property
    def can_lose_heads(self) -> bool:
        """Whether some heads of a layer may go while others stay."""
        return self.why_heads_stay is None

    @property
    def why_heads_stay(self) -> str | None:
        """What the architecture does that keeps some heads from going without the others; None where they can."""
        if self.qk_norm == "all_heads":
            return "normalises q and k over all heads together, so the others would change without some of them"
        return WHY_WHOLE if self.latent_attention else None

    @property
    def can_skip_biased_sublayers(self) -> bool:
        """Whether a sublayer that loses all its heads or channels may end in a bias.

        A later norm does not make zeros of a bias alone, so it would have to stay and be computed for every token.
        """
        return len(self.attention_norms) == len(self.mlp_norms) == 1

    def with_defaults(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """`config` with the keys that it leaves out."""
        absent = {key: value for key, value in self.defaults if config.get(key) is None}
        values = {key: config.get(value) if isinstance(value, str) else value for key, value in absent.items()}
        return {**config, **values}


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
# Of the routers that GLM-4.5 and DeepSeek-V3 have: sigmoid, a bias where experts are chosen, groups, a factor at last.
SIGMOID_ROUTER = ExpertsFormat(
    count_keys=("n_routed_experts",),
    layers="first_dense",
    shared_module="mlp.shared_experts",
    shared_count_key="n_shared_experts",
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
            experts=ExpertsFormat(
                count_keys=("num_experts",),
                layers="sparse_step",
                shared_module="mlp.shared_expert",
                shared_width_key="shared_expert_intermediate_size",
                shared_gate="mlp.shared_expert_gate",
            ),
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
            experts=ExpertsFormat(
                count_keys=("n_routed_experts",),
                layers="first_dense",
                shared_module="mlp.shared_experts",
                shared_count_key="n_shared_experts",
            ),
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
            experts=ExpertsFormat(
                count_keys=("num_experts",),
                shared_module="mlp.shared_expert",
                shared_width_key="shared_expert_intermediate_size",
                shared_gate="mlp.shared_expert_gate",
                norm_topk_prob=True,
                may_be_fused=True,
            ),
        ),
        Family(
            model_type="qwen3_next",
            architecture="Qwen3NextForCausalLM",
            linear_attention="joined",
            **QWEN3_NEXT,
            defaults=(*SHARED_EXPERT_512, ("norm_topk_prob", True)),
            experts=ExpertsFormat(
                count_keys=("num_experts",),
                layers="sparse_step",
                shared_module="mlp.shared_expert",
                shared_width_key="shared_expert_intermediate_size",
                shared_gate="mlp.shared_expert_gate",
            ),
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
