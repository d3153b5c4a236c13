"""The supported architectures, one row each: what distinguishes them for pruning. Pure Python.

All of them name their tensors as Llama does (`model.layers.{i}.self_attn.q_proj.weight` ...), so a row holds only
the differences: which biases exist, whether q and k are normalised, where experts live, and which pruned shapes the
stock model can say.
Adding an architecture is one row here and one in `pruned_vllm/serving/models.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.experts import ExpertsFormat

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
    def can_lose_heads(self) -> bool:
        """Whether the other heads compute the same without a head: not if the norm of q and k takes all together."""
        return self.qk_norm != "all_heads"

    def with_defaults(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """`config` with the keys that it leaves out."""
        absent = {key: value for key, value in self.defaults if config.get(key) is None}
        values = {key: config.get(value) if isinstance(value, str) else value for key, value in absent.items()}
        return {**config, **values}


KV_HEADS_AS_HEADS = (("num_key_value_heads", "num_attention_heads"),)
NORM_EPS_1E_5 = (("rms_norm_eps", 1e-5),)

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
