"""Attention with one latent vector for all heads (MLA): vLLM's own layer, with two faults of 0.32 kept away from it."""

from typing import Any

from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.models.deepseek_v2 import DeepseekV2DecoderLayer
from vllm.model_executor.models.llama import LlamaForCausalLM, LlamaModel
from vllm.model_executor.models.utils import WeightsMapper
from vllm.platforms import current_platform

from pruned_vllm.formats.latent import LATENT_NORM_EPS

_MLP = {name: joined for name, joined in LlamaModel.hf_to_vllm_mapper.orig_to_new_stacked.items() if "_up" in joined[0]}
_LOW_RANKS = {".q_a_proj": (".fused_qkv_a_proj", 0), ".kv_a_proj_with_mqa": (".fused_qkv_a_proj", 1)}


class LatentForCausalLM(LlamaForCausalLM):
    """vLLM's Llama around layers of DeepSeek: projections are joined as their attention has them."""

    packed_modules_mapping = {
        "gate_up_proj": ["gate_proj", "up_proj"],
        "fused_qkv_a_proj": ["q_a_proj", "kv_a_proj_with_mqa"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        model = vllm_config.model_config
        # VLLM_MLA_DISABLE has vLLM build another attention, which joins nothing.
        joins_low_ranks = model.hf_config.q_lora_rank is not None and model.use_mla
        joined = _MLP | _LOW_RANKS if joins_low_ranks else _MLP
        self.model.hf_to_vllm_mapper = WeightsMapper(orig_to_new_stacked=joined)


def latent_layer(vllm_config: VllmConfig, prefix: str) -> nn.Module:
    """DeepSeek-V2's layer, with a dense MLP: experts are a block of the plugin's. DeepSeek-V3 and GLM-4.7-Flash have
    the same."""
    config = vllm_config.model_config.hf_config
    config.first_k_dense_replace = config.num_hidden_layers  # all layers
    config.routed_scaling_factor = 1.0  # in float16 the layer divides by it what it expects its experts not to multiply
    config.rope_parameters = dict(config.rope_parameters)  # vLLM writes its own name of yarn into it
    layer: Any = DeepseekV2DecoderLayer(vllm_config, prefix)
    attention = layer.self_attn
    for name in ("q_a_layernorm", "kv_a_layernorm"):  # vLLM takes rms_norm_eps; Moonlight and GLM have another
        if hasattr(attention, name):
            getattr(attention, name).variance_epsilon = LATENT_NORM_EPS
    if current_platform.is_cpu():
        _rotate_natively(attention.rotary_emb)
    return layer


def _rotate_natively(rotary: Any) -> None:
    """Lets RotaryEmbedding turn q [tokens, heads, numbers] right on CPUs.

    For vLLM: `RotaryEmbedding.forward_cpu` (vllm/model_executor/layers/rotary_embedding/base.py) hands query and key to
    `ops.rotary_embedding` as they are. The CPU kernel reads query as [num_tokens, num_heads * head_size]. DeepSeek's
    attention (`MultiHeadLatentAttentionWrapper.forward`, and `DeepseekV2Attention.forward`) hands over the part of q
    that turns, a view [num_tokens, num_heads, qk_rope_head_dim] whose rows are as far apart as whole heads, and key as
    [num_tokens, 1, qk_rope_head_dim]. Nothing checks the number of dimensions, and the result is wrong without a word:
    on random numbers by up to 6 against `forward_native`, in both styles, contiguous or not, and right once query is
    reshaped to two dimensions. DeepSeek-V2, V3 and GLM-4.7-Flash answer with other tokens than Hugging Face's models.
    A fix there: `forward_cpu` flattens what has three dimensions and gives it its shape back, or falls back to
    `forward_native` for it.
    """
    if hasattr(rotary, "forward_native"):
        rotary._forward_method = rotary.forward_native
