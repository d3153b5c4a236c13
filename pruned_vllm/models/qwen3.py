"""Qwen3 with its own heads and FFN width in every layer."""

from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.models.qwen3 import Qwen3Attention
from vllm.model_executor.models.utils import extract_layer_index

from pruned_vllm.geometry import ModelGeometry
from pruned_vllm.models.base import PrunedForCausalLM
from pruned_vllm.models.layer import PrunedDecoderLayer


class PrunedQwen3DecoderLayer(PrunedDecoderLayer):
    def build_attention(
        self, vllm_config: VllmConfig, geometry: ModelGeometry, prefix: str, num_heads: int, num_kv_heads: int
    ) -> nn.Module:
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


class PrunedQwen3ForCausalLM(PrunedForCausalLM):
    decoder_layer_type = PrunedQwen3DecoderLayer
