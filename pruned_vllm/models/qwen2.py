"""Qwen2 with its own number of heads and FFN width in every layer.

vLLM's Qwen2 attention derives head_dim from the number of heads, which pruning changes. Its Llama layer takes head_dim
from the config, knows biases on q, k and v alone (`qkv_bias`), and computes the same otherwise.
"""

from copy import copy

from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM

from pruned_vllm.models.base import PrunedForCausalLM, layer_config


class PrunedQwen2DecoderLayer(LlamaDecoderLayer):
    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = copy(layer_config(vllm_config.model_config.hf_config, prefix))
        config.qkv_bias = True
        super().__init__(vllm_config, prefix, config=config)


class PrunedQwen2ForCausalLM(PrunedForCausalLM, LlamaForCausalLM):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=PrunedQwen2DecoderLayer)
