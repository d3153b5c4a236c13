"""Llama with its own number of heads and FFN width in every layer."""

from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM

from pruned_vllm.models.base import PrunedForCausalLM, layer_config


class PrunedLlamaDecoderLayer(LlamaDecoderLayer):
    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config, prefix, config=layer_config(vllm_config.model_config.hf_config, prefix))


class PrunedLlamaForCausalLM(PrunedForCausalLM, LlamaForCausalLM):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=PrunedLlamaDecoderLayer)
