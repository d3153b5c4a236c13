"""DeepSeekMoE-16B with its own heads in every layer and its own width for every expert."""

from pruned_vllm.models.base import PrunedForCausalLM
from pruned_vllm.models.llama import PrunedLlamaDecoderLayer


class PrunedDeepseekForCausalLM(PrunedForCausalLM):
    decoder_layer_type = PrunedLlamaDecoderLayer
