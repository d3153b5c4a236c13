"""The served classes: one table from `model_type` to the stock model and the stock decoder layer to serve it with.

vLLM finds a class here by the name of its architecture, `PrunedLlamaForCausalLM` and so on. The stock model gives what
is around the layers (`base.py`): vLLM's Llama where it computes what the family's own class does, since more options of
vLLM work with it than with any other. The stock layer is built at each layer's own sizes (`layer.py`).
"""

from typing import Any

from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.models.gemma3 import Gemma3DecoderLayer, Gemma3ForCausalLM
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralDecoderLayer
from vllm.model_executor.models.olmoe import OlmoeAttention
from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer

from pruned_vllm.formats.families import FAMILIES
from pruned_vllm.serving.attention import add_sinks
from pruned_vllm.serving.base import PrunedForCausalLM
from pruned_vllm.serving.layer import StockLayer


def olmoe_layer(vllm_config: VllmConfig, prefix: str) -> nn.Module:
    """Llama's layer with OLMoE's attention: vLLM's OLMoE layer takes 1e-5 for the epsilon of all its norms."""
    config = vllm_config.model_config.hf_config
    config.num_attention_heads = config.hidden_size // config.head_dim  # where it is removed, too: all heads or none

    def attention(prefix: str, **others: Any) -> nn.Module:
        module = OlmoeAttention(vllm_config=vllm_config, prefix=prefix)
        for norm in (module.q_norm, module.k_norm):
            norm.variance_epsilon = config.rms_norm_eps
        return module

    return LlamaDecoderLayer(vllm_config, prefix, attn_layer_type=attention)  # type: ignore[arg-type]


def gpt_oss_layer(vllm_config: VllmConfig, prefix: str) -> nn.Module:
    """Llama's layer with sinks: vLLM's gpt-oss layer takes 1e-5 for the epsilon of its norms, and yarn for granted."""
    layer = LlamaDecoderLayer(vllm_config, prefix)
    add_sinks(layer.self_attn, vllm_config)
    return layer


# Qwen2 and those with experts have Llama's layer: vLLM's Qwen2 derives head_dim from the number of heads, which pruning
# changes, and experts are a block of the plugin's.
SERVED: dict[str, tuple[type[nn.Module], StockLayer]] = {
    "llama": (LlamaForCausalLM, LlamaDecoderLayer),
    "mistral": (LlamaForCausalLM, MistralDecoderLayer),
    "ministral3": (LlamaForCausalLM, MistralDecoderLayer),
    "phi3": (LlamaForCausalLM, LlamaDecoderLayer),
    "qwen2": (LlamaForCausalLM, LlamaDecoderLayer),
    "qwen3": (LlamaForCausalLM, Qwen3DecoderLayer),
    "gemma3_text": (Gemma3ForCausalLM, Gemma3DecoderLayer),
    "mixtral": (LlamaForCausalLM, LlamaDecoderLayer),
    "qwen2_moe": (LlamaForCausalLM, LlamaDecoderLayer),
    "qwen3_moe": (LlamaForCausalLM, Qwen3DecoderLayer),
    "olmoe": (LlamaForCausalLM, olmoe_layer),
    "deepseek": (LlamaForCausalLM, LlamaDecoderLayer),
    "gpt_oss": (LlamaForCausalLM, gpt_oss_layer),
}

for _model_type, _family in FAMILIES.items():
    _stock_model, _stock_layer = SERVED[_model_type]
    _members = {"stock_layer": staticmethod(_stock_layer), "__module__": __name__}
    globals()[_family.pruned_architecture] = type(
        _family.pruned_architecture, (PrunedForCausalLM, _stock_model), _members
    )
