"""Llama with its own heads and FFN width in every layer."""

from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaAttention

from pruned_vllm.geometry import ModelGeometry
from pruned_vllm.models.base import PrunedForCausalLM
from pruned_vllm.models.layer import PrunedDecoderLayer


class PrunedLlamaDecoderLayer(PrunedDecoderLayer):
    attention_type: type[LlamaAttention] = LlamaAttention

    def build_attention(
        self, vllm_config: VllmConfig, geometry: ModelGeometry, prefix: str, num_heads: int, num_kv_heads: int
    ) -> nn.Module:
        config = vllm_config.model_config.hf_config
        return self.attention_type(
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


class PrunedLlamaForCausalLM(PrunedForCausalLM):
    decoder_layer_type = PrunedLlamaDecoderLayer
