"""Mistral with its own heads and FFN width in every layer."""

from vllm.model_executor.models.mistral import MistralAttention

from pruned_vllm.models.base import PrunedForCausalLM
from pruned_vllm.models.llama import PrunedLlamaDecoderLayer


class PrunedMistralDecoderLayer(PrunedLlamaDecoderLayer):
    attention_type = MistralAttention


class PrunedMistralForCausalLM(PrunedForCausalLM):
    decoder_layer_type = PrunedMistralDecoderLayer
