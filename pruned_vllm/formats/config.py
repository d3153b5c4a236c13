"""config.json as a file: read, and written for a converted model. Pure Python."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import read_json
from pruned_vllm.formats.agreed_config import agreed_config, stock_agrees
from pruned_vllm.formats.config_values import flag
from pruned_vllm.formats.experts import CONSTANT_EXPERTS, NUM_EXPERTS, SHARED_WIDTH
from pruned_vllm.formats.families import FAMILIES
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.headers import DRAFT_LAYERS
from pruned_vllm.formats.linear_attention import DEFAULTS as LINEAR_DEFAULTS
from pruned_vllm.formats.wrappers import text_config

# Optional keys that this project reads, for which null is as good as absent. Not all keys are like that: without
# sliding_window Mistral has a window, with null it has none.
NULL_IS_ABSENT = {
    *("architectures", "auto_map", "quantization_config", "per_layer_config", "pruning", "tie_word_embeddings"),
    *("head_dim", "num_key_value_heads", "attention_bias", "mlp_bias", "qkv_bias", "num_experts", "num_local_experts"),
    *("decoder_sparse_step", "mlp_only_layers", "moe_layer_freq", "first_k_dense_replace", "n_shared_experts"),
    *("shared_expert_intermediate_size", "allow_global_per_layer_attribute_access", "transformers_weights"),
    *("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "use_qk_norm"),
    *("num_experts_per_tok", "norm_topk_prob", "n_group", "topk_group", "routed_scaling_factor"),
    *("query_pre_attn_scalar", "full_attention_interval", *(f"linear_{key}" for key in LINEAR_DEFAULTS)),
}

# The families whose stock class in vLLM has a bias of o_proj, and a key for it.
O_BIAS_IN_VLLM = ("llama", "granite", "gemma3_text")


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a model directory, less the keys that are null; of a multimodal one, of its language model.

    Numbers in MXFP4, as gpt-oss is published, are read widened: such a model counts as one that is not quantized.
    Raises InputError.
    """
    config = text_config(read_json(directory / "config.json"))
    absent = {key for key in NULL_IS_ABSENT if config.get(key) is None}
    if is_packed(config):
        absent.add("quantization_config")
    return {key: value for key, value in config.items() if key not in absent}


def is_packed(config: Mapping[str, Any]) -> bool:
    """Whether a config.json as it is stored says that the experts are in MXFP4, in a family that is published so."""
    family, quantization = FAMILIES.get(str(config.get("model_type"))), config.get("quantization_config")
    is_fused = family is not None and family.experts is not None and family.experts.fused == "interleaved"
    return is_fused and isinstance(quantization, Mapping) and quantization.get("quant_method") == "mxfp4"


def dense_geometry(directory: Path, config: Mapping[str, Any]) -> ModelGeometry:
    """The geometry of a model that masks can be learned for and folded into, from its `read_config`.

    Raises:
        InputError: the model is not supported, quantized or pruned.
    """
    if "quantization_config" in config:
        raise InputError(f"{directory} is quantized; masks fold into float weights only: quantize afterwards")
    geometry = ModelGeometry.from_config(config)
    if not geometry.is_dense:
        raise InputError(
            f"{directory} is pruned already (config.json has per_layer_config); masks are for a dense model"
        )
    return geometry


def converted_config(geometry: ModelGeometry, config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` (this family's dense config.json) with this geometry written into it.

    Under the stock architecture where every layer is equal and the stock code can say it, so that no plugin is
    needed; else under the `Pruned` architecture with `per_layer_config`. Keys on which vLLM alone acts are left out.
    """
    config = agreed_config(geometry.family, config) | {"hidden_size": geometry.hidden_size}
    if config.get(DRAFT_LAYERS):  # what is written has none
        config[DRAFT_LAYERS] = 0
    if flag("tie_word_embeddings", geometry.family.with_defaults(config)) != geometry.tie_word_embeddings:
        config["tie_word_embeddings"] = geometry.tie_word_embeddings
    stock = _stock_config(geometry, config)
    if stock is not None:
        return stock
    width_key = geometry.family.experts.width_key if geometry.family.experts else ""
    overrides = {
        str(index): layer.to_overrides(dense, width_key)
        for index, (layer, dense) in enumerate(zip(geometry.layers, geometry.dense_layers, strict=True))
    }
    # Hugging Face wants every per-layer key at the top level too.
    ours: dict[str, int | None] = dict.fromkeys(
        ("query_heads_per_kv_head", "expert_intermediate_sizes", CONSTANT_EXPERTS)
    )
    if geometry.experts is not None:
        ours[NUM_EXPERTS] = geometry.experts.num_experts
        ours[SHARED_WIDTH] = geometry.experts.shared_intermediate_size
    return {
        **config,
        **{key: value for key, value in ours.items() if any(key in keys for keys in overrides.values())},
        "architectures": [geometry.family.pruned_architecture],
        "head_dim": geometry.head_dim,
        "num_key_value_heads": max(layer.num_key_value_heads for layer in geometry.dense_layers),
        # Without it LlamaConfig raises AmbiguousGlobalPerLayerAttributeError while it validates itself.
        "allow_global_per_layer_attribute_access": True,
        "per_layer_config": {index: keys for index, keys in overrides.items() if keys},
    }


def _stock_config(geometry: ModelGeometry, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """`config` (a dense config.json) with this geometry under a stock architecture, which needs no plugin.

    None where layers differ, lack a sublayer, or have sizes that the stock code refuses or reads differently.
    """
    if geometry.family.stores_fused:  # the stock code wants the fused tensors
        return None
    if geometry.latent is not None:  # which vLLM's own layer computes wrongly, see serving/latent.py
        return None
    layer, *others = (layer for layer in geometry.layers if not layer.linear_attention)
    same_heads = all(other.query_heads_per_kv_head == layer.query_heads_per_kv_head for other in others)
    if not same_heads or not layer.has_even_groups:
        return None
    widths = _uniform_widths(geometry, config)
    if widths is None or any(layer.skip for layer in geometry.layers) or not stock_agrees(geometry.family, config):
        return None
    if geometry.family.model_type not in O_BIAS_IN_VLLM and geometry.o_bias:
        return None
    heads, family = layer.num_attention_heads, geometry.family
    if family.stock_heads == "fills_hidden" and heads * geometry.head_dim != geometry.hidden_size:
        return None
    # Mistral would compute the same and takes any number of heads. But Transformers and vLLM choose the tokenizer's
    # class by the model_type, so the same text would become other tokens: the model_type stays what it was.
    if family.stock_heads == "divides_hidden" and geometry.hidden_size % heads:
        return None
    stock = {
        **config,
        "architectures": [family.architecture],
        "head_dim": geometry.head_dim,
        "num_attention_heads": heads,
        "num_key_value_heads": layer.num_key_value_heads,
        **widths,
    }
    for key in ("per_layer_config", "allow_global_per_layer_attribute_access"):
        stock.pop(key, None)
    return stock


def _uniform_widths(geometry: ModelGeometry, config: Mapping[str, Any]) -> dict[str, int] | None:
    """The top-level keys for FFN widths, and for the number of experts, that are the same in all layers of a kind; None
    where some differ."""
    with_experts = [layer for layer in geometry.layers if layer.expert_intermediate_sizes]
    dense = {layer.intermediate_size for layer in geometry.layers if not layer.expert_intermediate_sizes}
    if len(dense) > 1:
        return None
    widths = dict(zip(["intermediate_size"], dense, strict=False))  # no key where all layers have experts
    if with_experts:
        names, width = geometry.family.experts_format, with_experts[0].expert_width
        counts = {len(layer.expert_intermediate_sizes) for layer in with_experts}
        if not width or {layer.expert_width for layer in with_experts} != {width} or len(counts) > 1:
            return None
        shared = {layer.intermediate_size for layer in with_experts}
        if names.shared_width_key is not None and len(shared) == 1:
            widths |= {names.shared_width_key: next(iter(shared))} if any(shared) else {}
        elif shared != {geometry.dense_experts.shared_intermediate_size}:
            return None
        if names.shared_count_key is not None and width != geometry.dense_experts.intermediate_size:
            return None  # the width of the shared MLP is a multiple of this key
        widths[names.width_key] = width
        widths |= names.with_count(config, counts.pop())
    return widths
