"""Mistral with its own number of heads and FFN width in every layer."""

from vllm.config import VllmConfig
from vllm.model_executor.models.mistral import MistralDecoderLayer, MistralForCausalLM

from pruned_vllm.models.base import PrunedForCausalLM, layer_config


class PrunedMistralDecoderLayer(MistralDecoderLayer):
    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config, prefix, config=layer_config(vllm_config.model_config.hf_config, prefix))


class PrunedMistralForCausalLM(PrunedForCausalLM, MistralForCausalLM):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=PrunedMistralDecoderLayer)
