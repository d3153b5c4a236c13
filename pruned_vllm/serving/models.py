"""The served classes: one table from `model_type` to the stock model and the stock decoder layer to serve it with.

vLLM finds a class here by the name of its architecture, `PrunedLlamaForCausalLM` and so on. The stock model gives what
is around the layers (`base.py`): vLLM's Llama where it computes what the family's own class does, since more options of
vLLM work with it than with any other. The stock layer is built at each layer's own sizes (`layer.py`).
"""

from functools import cache
from importlib import import_module
from typing import Any

from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.models.gemma3 import Gemma3DecoderLayer, Gemma3ForCausalLM
from vllm.model_executor.models.glm4_moe import Glm4MoeDecoderLayer
from vllm.model_executor.models.granite import GraniteDecoderLayer, GraniteForCausalLM
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralDecoderLayer
from vllm.model_executor.models.olmoe import OlmoeAttention
from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer

from pruned_vllm.formats.families import FAMILIES
from pruned_vllm.formats.family import Family
from pruned_vllm.serving.attention import add_sinks
from pruned_vllm.serving.base import PrunedForCausalLM
from pruned_vllm.serving.latent import LatentForCausalLM, latent_layer
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

    return LlamaDecoderLayer(vllm_config, prefix, attn_layer_type=attention)


def glm_layer(config: Any, cache_config: Any, quant_config: Any, prefix: str) -> nn.Module:
    """GLM's layer with a dense MLP: experts are a block of the plugin's."""
    config.first_k_dense_replace = config.num_hidden_layers  # all layers
    config.rope_parameters = dict(config.rope_parameters)  # which vLLM writes defaults into
    return Glm4MoeDecoderLayer(config, cache_config, quant_config, prefix)


def gpt_oss_layer(vllm_config: VllmConfig, prefix: str) -> nn.Module:
    """Llama's layer with sinks: vLLM's gpt-oss layer takes 1e-5 for the epsilon of its norms, and yarn for granted."""
    layer = LlamaDecoderLayer(vllm_config, prefix)
    add_sinks(layer.self_attn, vllm_config)
    return layer


# Qwen2 and those with experts have Llama's layer: vLLM's Qwen2 derives head_dim from the number of heads, which pruning
# changes, and experts are a block of the plugin's.
SERVED: dict[str, tuple[type[nn.Module], StockLayer]] = {
    "llama": (LlamaForCausalLM, LlamaDecoderLayer),
    "granite": (GraniteForCausalLM, GraniteDecoderLayer),
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
    "deepseek_v2": (LatentForCausalLM, latent_layer),
    "deepseek_v3": (LatentForCausalLM, latent_layer),
    "glm4_moe": (LlamaForCausalLM, glm_layer),
    "glm4_moe_lite": (LatentForCausalLM, latent_layer),
    "gpt_oss": (LlamaForCausalLM, gpt_oss_layer),
}

# Modules that have rows of their own, imported when one is asked for: the kernels that they import are for few models,
# and where one cannot be imported no other family may suffer.
SERVED_ELSEWHERE = dict.fromkeys(
    ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), "pruned_vllm.serving.gated_delta_net"
)


def served(model_type: str) -> tuple[type[nn.Module], StockLayer]:
    """The row of a family."""
    if model_type in SERVED:
        return SERVED[model_type]
    row: tuple[type[nn.Module], StockLayer] = import_module(SERVED_ELSEWHERE[model_type]).SERVED[model_type]
    return row


@cache
def _served_class(family: Family) -> type[nn.Module]:
    stock_model, stock_layer = served(family.model_type)
    members = {"stock_layer": staticmethod(stock_layer), "__module__": __name__}
    return type(family.pruned_architecture, (PrunedForCausalLM, stock_model), members)


def __getattr__(name: str) -> type[nn.Module]:
    """The class of an architecture, as vLLM asks for it; AttributeError for other names."""
    for family in FAMILIES.values():
        if name == family.pruned_architecture:
            return _served_class(family)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
