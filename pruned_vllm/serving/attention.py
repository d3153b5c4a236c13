"""How each family's stock attention is built at a layer's own number of heads.

A builder takes `num_heads` and `num_kv_heads` of all tensor-parallel ranks together and returns vLLM's own module.
"""

from collections.abc import Callable
from functools import partial

from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.models.llama import LlamaAttention
from vllm.model_executor.models.mistral import MistralAttention
from vllm.model_executor.models.olmoe import OlmoeAttention
from vllm.model_executor.models.qwen3 import Qwen3Attention
from vllm.model_executor.models.utils import extract_layer_index

from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.geometry import ModelGeometry

AttentionBuilder = Callable[[VllmConfig, ModelGeometry, str, int, int], nn.Module]


def build_llama_attention(
    vllm_config: VllmConfig,
    geometry: ModelGeometry,
    prefix: str,
    num_heads: int,
    num_kv_heads: int,
    attention_type: type[LlamaAttention] = LlamaAttention,
) -> nn.Module:
    """Llama's attention, which takes head_dim from the config and has biases or not.

    Qwen2 is served with it too: vLLM's Qwen2 attention derives head_dim from the number of heads, which pruning
    changes.
    """
    config = vllm_config.model_config.hf_config
    return attention_type(
        config=config,
        hidden_size=geometry.hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        max_position_embeddings=config.max_position_embeddings,
        quant_config=vllm_config.quant_config,
        bias=geometry.qkv_bias,
        bias_o_proj=geometry.o_bias,
        cache_config=vllm_config.cache_config,
        prefix=prefix,
    )


build_mistral_attention = partial(build_llama_attention, attention_type=MistralAttention)


def build_qwen3_attention(
    vllm_config: VllmConfig, geometry: ModelGeometry, prefix: str, num_heads: int, num_kv_heads: int
) -> nn.Module:
    """Qwen3's attention, which normalises each head of q and k."""
    config = vllm_config.model_config.hf_config
    layer_types = getattr(config, "layer_types", None)  # Qwen3-MoE has none
    is_sliding = layer_types is not None and layer_types[extract_layer_index(prefix)] == "sliding_attention"
    attention = Qwen3Attention(
        hidden_size=geometry.hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        rope_parameters=config.rope_parameters,
        max_position=config.max_position_embeddings,
        head_dim=geometry.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        qkv_bias=geometry.qkv_bias,
        cache_config=vllm_config.cache_config,
        quant_config=vllm_config.quant_config,
        prefix=prefix,
        per_layer_sliding_window=config.sliding_window if is_sliding else None,
    )
    if geometry.o_bias:  # Hugging Face's Qwen3 has it with attention_bias, vLLM's never
        attention.o_proj = RowParallelLinear(
            num_heads * geometry.head_dim,
            geometry.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.o_proj",
        )
    return attention


def build_olmoe_attention(
    vllm_config: VllmConfig, geometry: ModelGeometry, prefix: str, num_heads: int, num_kv_heads: int
) -> nn.Module:
    """OLMoE's attention, whose heads stay: it normalises q and k over all of them together."""
    if geometry.layers[0].num_attention_heads != num_heads:
        raise InputError(
            f"{prefix}: OLMoE normalises q and k over all heads together, so none can be padded; choose a "
            f"--tensor-parallel-size that divides {geometry.layers[0].num_attention_heads} heads"
        )
    attention = OlmoeAttention(vllm_config=vllm_config, prefix=prefix)
    for norm in (attention.q_norm, attention.k_norm):  # vLLM's have 1e-5, whatever config.json says
        norm.variance_epsilon = vllm_config.model_config.hf_config.rms_norm_eps
    return attention
