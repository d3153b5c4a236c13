"""What a stock decoder layer is built from: vLLM's configuration, as if all layers of the model were like this one."""

import copy
from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, resolve_quant_method

from pruned_vllm.serving.model_layout import ModelLayout


def layer_config(vllm_config: VllmConfig, model_layout: ModelLayout, index: int, exchanged: list[str]) -> VllmConfig:
    """`vllm_config` for layer `index`: its sizes, those of all tensor-parallel ranks together with their padding.

    Nothing that vLLM has is changed: these are copies, as deep as the values that differ.

    Args:
        exchanged: modules of the layer that other modules will replace, by full name. They are built plain, of one
            head or channel on each rank.
    """
    geometry, layout, ranks = model_layout.geometry, model_layout.layers[index], model_layout.ranks
    config, experts = copy.copy(vllm_config.model_config.hf_config), geometry.layers[index].expert_intermediate_sizes
    config.per_layer_config = None
    sizes: dict[str, int | bool] = {
        "head_dim": geometry.head_dim,
        "num_attention_heads": layout.total_op_heads or ranks,
        "num_key_value_heads": layout.total_kv_heads or ranks,
        "intermediate_size": ranks if experts else (layout.channels or 1) * ranks,
        # In the words of vLLM's Llama, with which families are served that have other biases.
        "qkv_bias": geometry.qkv_bias,
        "attention_bias": geometry.o_bias,
        "mlp_bias": geometry.mlp_bias,
    }
    for key, value in sizes.items():
        setattr(config, key, value)
    own_config = copy.copy(vllm_config)
    own_config.model_config = copy.copy(vllm_config.model_config)
    own_config.model_config.hf_config = own_config.model_config.hf_text_config = config
    if vllm_config.quant_config is not None and exchanged:
        own_config.quant_config = _without(vllm_config.quant_config, exchanged)
    return own_config


def _without(quant_config: QuantizationConfig, modules: list[str]) -> QuantizationConfig:
    """`quant_config` that leaves these modules and what is in them plain: their sizes are such that no scheme fits."""
    stock_class: Any = type(quant_config)
    prefixes = tuple(f"{module}." for module in modules)

    class Without(stock_class):
        def get_quant_method(self, layer: Any, prefix: str) -> Any:
            if prefix.startswith(prefixes):
                return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
            return resolve_quant_method(quant_config, layer, prefix)

    without: Any = copy.copy(quant_config)
    without.__class__ = Without
    without.online_quantization_config = None  # `quant_config` has it, and it would reach all modules
    return without
