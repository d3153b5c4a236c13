"""Rows of `models.py` for Qwen3-Next and Qwen3.5, in which most layers have a gated delta net in place of attention.

vLLM's Qwen3.5 is its Qwen3-Next with another layout of the inputs of gated delta nets. It is built of Qwen3-Next here,
since vLLM's own file imports what reads images, and with it torchvision, which a CPU installation lacks.
"""

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn import QwenGatedDeltaNetAttention
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.qwen3_next import Qwen3NextDecoderLayer, Qwen3NextForCausalLM
from vllm.model_executor.models.utils import WeightsMapper

from pruned_vllm.formats.linear_attention import LINEAR
from pruned_vllm.serving.layer import StockLayer


class Qwen3Next(Qwen3NextForCausalLM):
    """The stock model, which may have no layers yet while it is built, and whose lm_head may be the embedding."""

    lm_head: ParallelLMHead

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if self.config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)

    def set_moe_parameters(self) -> None:
        """The stock model looks for vLLM's own experts, to spread them over ranks: pruned models do not do that."""


class Qwen3_5(Qwen3Next):
    """The same, of gated delta nets whose inputs have projections apart from each other in files."""

    packed_modules_mapping = {
        **Qwen3NextForCausalLM.packed_modules_mapping,
        "in_proj_qkvz": ["in_proj_qkv", "in_proj_z"],
        "in_proj_ba": ["in_proj_b", "in_proj_a"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        parts = {
            ".in_proj_qkv": (".in_proj_qkvz", (0, 1, 2)),
            ".in_proj_z": (".in_proj_qkvz", 3),
            ".in_proj_b": (".in_proj_ba", 0),
            ".in_proj_a": (".in_proj_ba", 1),
        }
        self.model.hf_to_vllm_mapper = self.model.hf_to_vllm_mapper | WeightsMapper(orig_to_new_stacked=parts)


class GatedDeltaNet(QwenGatedDeltaNetAttention):
    """vLLM's, with a fault of 0.32 kept away from it.

    For vLLM: `forward_cpu` splits the output of `in_proj_qkvz` where the layout is Qwen3.5's, and the op calls
    `contiguous` on the first part. For one token that copies nothing, the stride of the only row stays that of both
    parts, and `causal_conv1d_fwd_cpu` ends the engine with "expect x to be transposed". A prompt of one token that
    comes alone is enough. A fix there: `clone(memory_format=torch.contiguous_format)`.
    """

    def forward_cpu(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden_size] -> the same, computed with a row of zeros that belongs to no request."""
        outputs: torch.Tensor = super().forward_cpu(nn.functional.pad(hidden_states, (0, 0, 0, 1)))
        return outputs[:-1]


def qwen3_next_layer(vllm_config: VllmConfig, layer_type: str, prefix: str) -> nn.Module:
    """The stock layer with a dense MLP: a block of the plugin's takes its place where there are experts."""
    vllm_config.model_config.hf_config.num_experts = 0
    return Qwen3NextDecoderLayer(vllm_config, layer_type, prefix)


def qwen3_5_layer(vllm_config: VllmConfig, layer_type: str, prefix: str) -> nn.Module:
    """Qwen3-Next's layer with the other layout."""
    layer: Any = qwen3_next_layer(vllm_config, layer_type, prefix)
    if layer_type == LINEAR:
        name = f"{prefix}.linear_attn"
        del get_current_vllm_config().compilation_config.static_forward_context[name]
        config = vllm_config.model_config.hf_config
        layer.linear_attn = GatedDeltaNet(config, vllm_config, name, gqa_interleaved_layout=False)
    return layer


SERVED: dict[str, tuple[type[nn.Module], StockLayer]] = {
    "qwen3_next": (Qwen3Next, qwen3_next_layer),
    "qwen3_5_text": (Qwen3_5, qwen3_5_layer),
    "qwen3_5_moe_text": (Qwen3_5, qwen3_5_layer),
}
