"""A decoder layer of any geometry: stock attention and MLP at their real sizes, or nothing where they were removed."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.llama import LlamaMLP
from vllm.model_executor.models.utils import extract_layer_index

from pruned_vllm.serving.attention import AttentionBuilder
from pruned_vllm.serving.model_layout import ModelLayout
from pruned_vllm.serving.ragged_moe import MoEBlock
from pruned_vllm.serving.sharding import LayerLayout


class PrunedDecoderLayer(nn.Module):
    """One layer of a pruned model. The family's `build_attention` makes its attention, the rest is common.

    Not a subclass of a stock layer: those build attention and MLP unconditionally, and an attention that is built has
    a KV cache.
    """

    def __init__(
        self, vllm_config: VllmConfig, prefix: str, model_layout: ModelLayout, build_attention: AttentionBuilder
    ) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        index = extract_layer_index(prefix)
        geometry, layout = model_layout.geometry, model_layout.layers[index]
        layer = geometry.layers[index]
        norm = partial(RMSNorm, geometry.hidden_size, eps=config.rms_norm_eps)
        if layer.query_heads_per_kv_head:
            self.input_layernorm = norm()
            self.self_attn = build_attention(
                vllm_config,
                geometry,
                f"{prefix}.self_attn",
                layout.total_op_heads,
                layout.total_kv_heads,
            )
            if layout.is_compact:
                compact_attention(self.self_attn, layout, vllm_config, f"{prefix}.self_attn")
        else:
            self.input_layernorm = None
            self.self_attn = Removed("o_proj", geometry.hidden_size, geometry.o_bias)
        if layer.expert_intermediate_sizes:
            self.post_attention_layernorm = norm()
            self.mlp: nn.Module = MoEBlock(vllm_config, model_layout, index, f"{prefix}.mlp")
        elif layer.intermediate_size:
            self.post_attention_layernorm = norm()
            self.mlp = LlamaMLP(
                hidden_size=geometry.hidden_size,
                intermediate_size=layout.channels * len(layout.shards),
                hidden_act=config.hidden_act,
                quant_config=vllm_config.quant_config,
                bias=geometry.mlp_bias,
                prefix=f"{prefix}.mlp",
            )
        else:
            self.post_attention_layernorm = None
            self.mlp = Removed("down_proj", geometry.hidden_size, geometry.mlp_bias)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What stock layers do, sublayer by sublayer; `residual` is None until the first norm has seen one."""
        if residual is None and not torch.compiler.is_compiling():
            # The caller's own: EAGLE-3 may keep it as an auxiliary hidden state, and norms overwrite the residual.
            hidden_states = hidden_states.clone()
        if self.input_layernorm is None:
            hidden_states = self.self_attn(hidden_states)
        else:
            hidden_states, residual = _add_and_norm(self.input_layernorm, hidden_states, residual)
            hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states)
        if self.post_attention_layernorm is None:
            hidden_states = self.mlp(hidden_states)
        else:
            hidden_states, residual = _add_and_norm(self.post_attention_layernorm, hidden_states, residual)
            hidden_states = self.mlp(hidden_states)
        if residual is None:  # the next layer, the final norm and pipeline parallelism expect one
            hidden_states, residual = torch.zeros_like(hidden_states), hidden_states
        return hidden_states, residual


def _add_and_norm(norm: RMSNorm, hidden_states: torch.Tensor, residual: torch.Tensor | None):
    """(norm(hidden_states + residual), hidden_states + residual); may overwrite both, as the stock norm may."""
    if residual is None:
        return norm(hidden_states), hidden_states
    if _has_fused_norm(norm, hidden_states, residual):
        torch.ops._C.fused_add_rms_norm(hidden_states, residual, norm.weight.data, norm.variance_epsilon)
        return hidden_states, residual
    return norm(hidden_states, residual)


def _has_fused_norm(norm: RMSNorm, hidden_states: torch.Tensor, residual: torch.Tensor) -> bool:
    """Whether vLLM's CPU build can compute this in one op.

    vLLM itself lists that op for GPUs only (`vllm/kernels/vllm_c.py`), so that --ir-op-priority cannot choose it, and
    runs some ten ops of PyTorch instead: 30 microseconds for one token, not 4. Inductor, which fuses the ten, makes
    them faster than the op. The op refuses rows that are not whole vectors of 8 (`csrc/cpu/layernorm.cpp`).
    """
    return (
        not torch.compiler.is_compiling()
        and hidden_states.is_cpu
        and hidden_states.shape[-1] % 8 == 0
        and norm.has_weight
        and norm.variance_size_override is None
        and hidden_states.dtype == residual.dtype == norm.weight.dtype
        and hidden_states.is_contiguous()
        and residual.is_contiguous()
        and hasattr(torch.ops._C, "fused_add_rms_norm")
    )


class Removed(nn.Module):
    """A sublayer whose units are all gone: it adds nothing but the bias of its last projection, where that has one.

    Args:
        projection: the last projection's name, which the bias keeps in the checkpoint.
    """

    def __init__(self, projection: str, hidden_size: int, has_bias: bool) -> None:
        super().__init__()
        if has_bias:
            bias = nn.Parameter(torch.empty(hidden_size), requires_grad=False)
            self.add_module(projection, nn.ParameterDict({"bias": bias}))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Adds to `hidden_states`, which hold what the sublayer before added and has not been normed yet."""
        for bias in self.parameters():
            hidden_states = hidden_states + bias
        return hidden_states


def compact_attention(attention: Any, layout: LayerLayout, vllm_config: VllmConfig, prefix: str) -> None:
    """Gives a stock attention projections of the real query heads only, where query groups are uneven.

    The attention op knows no uneven groups: it keeps `layout.op_heads` query heads, as the stock class built it, and
    `UnevenGroups` goes around it. The projections are built anew at their real size.
    """
    ranks = len(layout.shards)
    total_num_heads = layout.query_heads * ranks
    qkv_proj, o_proj = attention.qkv_proj, attention.o_proj
    attention.qkv_proj = QKVParallelLinear(
        qkv_proj.hidden_size,
        attention.head_dim,
        total_num_heads,
        attention.total_num_kv_heads,
        bias=qkv_proj.bias is not None,
        quant_config=vllm_config.quant_config,
        prefix=f"{prefix}.qkv_proj",
    )
    attention.o_proj = RowParallelLinear(
        total_num_heads * attention.head_dim,
        o_proj.output_size,
        bias=o_proj.bias is not None,
        quant_config=vllm_config.quant_config,
        prefix=f"{prefix}.o_proj",
    )
    attention.total_num_heads = total_num_heads
    attention.num_heads = layout.query_heads
    attention.q_size = layout.query_heads * attention.head_dim
    attention.attn = UnevenGroups(attention.attn, layout, get_tensor_model_parallel_rank())


class UnevenGroups(nn.Module):
    """An attention op for KV heads with different numbers of query heads.

    Every KV head gets as many query heads as the widest group: q is spread out before the op, and its real heads are
    picked from the output. No KV head is copied, and nothing outside of the op sees the padding.
    """

    source: torch.Tensor  # head of q for each head of the op
    target: torch.Tensor  # head of the op for each real one

    def __init__(self, attn: nn.Module, layout: LayerLayout, rank: int) -> None:
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
        """q [tokens, query_heads * head_dim], k and v [tokens, kv_heads * head_dim] -> like q."""
        output = self.attn(self._select(q, self.source), k, v)
        return self._select(output, self.target)

    def _select(self, heads: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return heads.unflatten(-1, (-1, self.head_dim)).index_select(-2, index).flatten(-2)
