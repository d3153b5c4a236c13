"""Which pruned shapes a stock architecture can say, and the config.json that says it. Pure Python."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pruned_vllm.families import FAMILIES

if TYPE_CHECKING:
    from pruned_vllm.geometry import ModelGeometry


def stock_config(geometry: "ModelGeometry", config: Mapping[str, Any]) -> dict[str, Any] | None:
    """`config` (a dense config.json) with this geometry under a stock architecture, which needs no plugin.

    None where layers differ, lack a sublayer, or have sizes that the stock code refuses or reads differently.
    """
    layer = geometry.layers[0]
    if len(set(geometry.layers)) > 1 or layer.skip or not layer.has_even_groups:
        return None
    if geometry.family.qk_norm and geometry.o_bias:  # vLLM's Qwen3 has no such bias
        return None
    heads, family, extra = layer.num_attention_heads, geometry.family, {}
    if family.stock_heads == "fills_hidden" and heads * geometry.head_dim != geometry.hidden_size:
        return None
    if family.stock_heads == "divides_hidden" and geometry.hidden_size % heads:
        if geometry.qkv_bias or geometry.o_bias or geometry.mlp_bias:
            return None
        # Mistral computes what Llama computes, and its config accepts any number of heads.
        family = FAMILIES["mistral"]
        extra = {
            "model_type": "mistral",
            "sliding_window": None,  # MistralConfig's default is a window
            "max_position_embeddings": config.get("max_position_embeddings", 2048),  # LlamaConfig's default
        }
    stock = {
        **config,
        **extra,
        "architectures": [family.architecture],
        "head_dim": geometry.head_dim,
        "num_attention_heads": heads,
        "num_key_value_heads": layer.num_key_value_heads,
        "intermediate_size": layer.intermediate_size,
    }
    for key in ("per_layer_config", "allow_global_per_layer_attribute_access"):
        stock.pop(key, None)
    return stock
