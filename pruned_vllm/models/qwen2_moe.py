"""Qwen2-MoE with its own heads in every layer and its own width for every expert."""

from pruned_vllm.models.base import PrunedForCausalLM
from pruned_vllm.models.llama import PrunedLlamaDecoderLayer


class PrunedQwen2MoeForCausalLM(PrunedForCausalLM):
    decoder_layer_type = PrunedLlamaDecoderLayer
