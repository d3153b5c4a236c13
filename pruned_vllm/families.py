"""The supported architectures, one row each: what distinguishes them for pruning. Pure Python.

All of them name their tensors as Llama does (`model.layers.{i}.self_attn.q_proj.weight` ...), so a row holds only
the differences: which biases exist, whether q and k are normalised, and which pruned shapes the stock model can say.
Adding an architecture is one row here and one small class in `pruned_vllm/models/`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

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
        qk_norm: q and k are RMS-normalised per head (weights `q_norm`, `k_norm` of size [head_dim]).
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
    qk_norm: bool = False
    default_head_dim: int | None = None
    stock_heads: Literal["any", "divides_hidden", "fills_hidden"] = "any"

    @property
    def pruned_architecture(self) -> str:
        """Name in `architectures` of a converted model; served by the plugin's class of the same name."""
        return PRUNED_PREFIX + self.architecture


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
        ),
        Family(model_type="mistral", architecture="MistralForCausalLM"),
        Family(model_type="qwen2", architecture="Qwen2ForCausalLM", qkv_bias=True, stock_heads="fills_hidden"),
        Family(
            model_type="qwen3",
            architecture="Qwen3ForCausalLM",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            qk_norm=True,
            default_head_dim=128,
        ),
    )
}


def find_family(config: Mapping[str, Any]) -> Family | None:
    """The row for a config.json, dense or converted; None when the architecture is not supported."""
    family = FAMILIES.get(str(config.get("model_type")))
    if family and config.get("architectures") in ([family.architecture], [family.pruned_architecture]):
        return family
    return None
