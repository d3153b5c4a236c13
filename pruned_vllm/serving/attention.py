"""Attention whose KV heads have different numbers of query heads, and biases that a stock class does not have."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from pruned_vllm.common.padding import take_or_zero
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.serving.sharding import LayerLayout


def fit_projections(
    attention: Any, geometry: ModelGeometry, layout: LayerLayout, vllm_config: VllmConfig, prefix: str
) -> None:
    """Gives a stock attention the projections that the checkpoint has, where it was built with others.

    The attention op knows no uneven groups: where they differ it keeps `layout.op_heads` query heads, as the stock
    class built it, `UnevenGroups` goes around it, and the projections are built anew with the real query heads only.
    They are built anew for their biases as well: Hugging Face's Qwen3 may have one in o_proj, vLLM's never has.
    """
    total_num_heads = layout.query_heads * len(layout.shards)
    qkv_proj, o_proj = attention.qkv_proj, attention.o_proj
    if layout.is_compact or (qkv_proj.bias is not None) != geometry.qkv_bias:
        attention.qkv_proj = QKVParallelLinear(
            qkv_proj.hidden_size,
            attention.head_dim,
            total_num_heads * (1 + geometry.family.output_gate),
            attention.total_num_kv_heads,
            bias=geometry.qkv_bias,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
    if layout.is_compact or (o_proj.bias is not None) != geometry.o_bias:
        attention.o_proj = RowParallelLinear(
            total_num_heads * attention.head_dim,
            o_proj.output_size,
            bias=geometry.o_bias,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.o_proj",
        )
    if geometry.family.sinks:
        attention.sinks.weight_loader = partial(_load_sinks, layout.op_slots(get_tensor_model_parallel_rank()))
    if layout.is_compact:
        attention.total_num_heads = total_num_heads
        attention.num_heads = layout.query_heads
        attention.q_size = layout.query_heads * attention.head_dim
        attention.attn = UnevenGroups(attention.attn, layout, get_tensor_model_parallel_rank())
        _spread_before_rotary(attention)


def _spread_before_rotary(attention: Any) -> None:
    """Not where Qwen3-Next's fused kernel rotates: that reads what the rotary module holds, and takes any heads."""
    has_rotary = getattr(attention, "rotary_emb", None) is not None
    if has_rotary and not getattr(attention, "use_fused_qk_norm_rope_gate", False):
        attention.rotary_emb = SpreadRotary(attention.rotary_emb, attention.attn)


def add_sinks(attention: Any, vllm_config: VllmConfig) -> None:
    """Gives a Llama attention a number for each query head of its op that the softmax counts as one logit more.

    The op has to know when it is built, so it is built anew.
    """
    op = attention.attn
    del vllm_config.compilation_config.static_forward_context[op.layer_name]
    attention.sinks = nn.Parameter(torch.empty(op.num_heads), requires_grad=False)
    attention.attn = Attention(
        op.num_heads,
        op.head_size,
        attention.scaling,
        num_kv_heads=op.num_kv_heads,
        cache_config=vllm_config.cache_config,
        quant_config=vllm_config.quant_config,
        per_layer_sliding_window=op.sliding_window,
        prefix=op.layer_name,
        sinks=attention.sinks,
    )


def _load_sinks(query_heads: list[int], parameter: torch.Tensor, sinks: torch.Tensor) -> None:
    """Args: query_heads: what the heads of the rank's attention op are, PAD for heads that nothing reads."""
    parameter.data.copy_(take_or_zero(sinks, 0, torch.tensor(query_heads, device="cpu")))


class UnevenGroups(nn.Module):
    """An attention op for KV heads with different numbers of query heads.

    Every KV head gets as many query heads as the widest group: q is spread out before the op, and its real heads are
    picked from the output. No KV head is copied, and nothing outside of the op sees the padding.
    """

    source: torch.Tensor  # head of q for each head of the op
    target: torch.Tensor  # head of the op for each real one

    def __init__(self, attn: Any, layout: LayerLayout, rank: int) -> None:
        super().__init__()
        self.attn = attn
        self.head_dim = attn.head_size
        self.register_buffer("source", torch.tensor(layout.op_source(rank)), persistent=False)
        self.register_buffer("target", torch.tensor(layout.op_target(rank)), persistent=False)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterable[str]:
        """Hands the scales of the KV cache on to the op, which the checkpoint knows by this module's name."""
        for name, tensor in weights:
            parameter = getattr(self.attn, name, None)
            if parameter is not None:  # as in stock models, scales that the op does not know are left out
                getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor)
                yield f"attn.{name}"

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [tokens, query_heads * head_dim], or spread out already, k and v [tokens, kv_heads * head_dim] -> output
        [tokens, query_heads * head_dim]."""
        return self._select(self.attn(self.spread(q), k, v), self.target)

    def spread(self, q: torch.Tensor) -> torch.Tensor:
        """q [tokens, query_heads * head_dim] as the op takes it, [tokens, op_heads * head_dim]; that stays as it is."""
        return q if q.shape[-1] == len(self.source) * self.head_dim else self._select(q, self.source)

    def _select(self, heads: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return heads.unflatten(-1, (-1, self.head_dim)).index_select(-2, index).flatten(-2)


class SpreadRotary(nn.Module):
    """The rotary embedding in front of `UnevenGroups`, which spreads q out before it.

    For vLLM: its CUDA kernel (rotary_embedding in csrc/pos_encoding_kernels.cu) stops where the number of KV heads does
    not divide that of the query heads. Compiled models do not call that kernel by default.
    """

    def __init__(self, rotary: nn.Module, groups: UnevenGroups) -> None:
        super().__init__()
        self.rotary = rotary
        self._spread = groups.spread  # not the module, which belongs to the attention

    def forward(self, positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.rotary(positions, self._spread(q), k)
