"""Qwen2 with its own heads and FFN width in every layer.

vLLM's Qwen2 attention derives head_dim from the number of heads, which pruning changes. Its Llama attention takes
head_dim from the config, knows biases on q, k and v alone, and computes the same otherwise.
"""

from pruned_vllm.models.base import PrunedForCausalLM
from pruned_vllm.models.llama import PrunedLlamaDecoderLayer


class PrunedQwen2ForCausalLM(PrunedForCausalLM):
    decoder_layer_type = PrunedLlamaDecoderLayer
