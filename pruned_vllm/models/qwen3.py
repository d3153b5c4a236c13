"""Qwen3 with its own number of heads and FFN width in every layer."""

from torch import nn
from transformers import PreTrainedConfig
from vllm.config import CacheConfig, VllmConfig
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer, Qwen3Model

from pruned_vllm.models.base import PrunedForCausalLM, layer_config


class PrunedQwen3DecoderLayer(Qwen3DecoderLayer):
    def __init__(
        self,
        config: PreTrainedConfig,
        cache_config: CacheConfig | None = None,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__(layer_config(config, prefix), cache_config, quant_config, prefix)


class PrunedQwen3Model(Qwen3Model):
    decoder_layer_type = PrunedQwen3DecoderLayer


class PrunedQwen3ForCausalLM(PrunedForCausalLM, LlamaForCausalLM):
    """Stands on LlamaForCausalLM because Qwen3ForCausalLM names its model class inside `__init__`; what the two put
    around the decoder stack (embedding, lm_head, logits) is the same."""

    def _init_model(self, vllm_config: VllmConfig, prefix: str = "", layer_type: type[nn.Module] | None = None):
        return PrunedQwen3Model(vllm_config=vllm_config, prefix=prefix)
