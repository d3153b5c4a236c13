"""Qwen3-MoE with its own heads in every layer and its own width for every expert."""

from pruned_vllm.models.base import PrunedForCausalLM
from pruned_vllm.models.qwen3 import PrunedQwen3DecoderLayer


class PrunedQwen3MoeForCausalLM(PrunedForCausalLM):
    decoder_layer_type = PrunedQwen3DecoderLayer
