"""Attention with query groups of different sizes, without an engine."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pruned_vllm.serving.attention import SpreadRotary, UnevenGroups, _spread_before_rotary
from pruned_vllm.serving.sharding import LayerLayout, Shard

HEAD_DIM = 2
# KV heads with 1 and 3 query heads, so the op has 6.
LAYOUT = LayerLayout((Shard((0, 1), ((0,), (1, 2, 3)), range(0)),), kv_heads=2, query_heads=4, group_size=3, channels=0)


class Op(nn.Module):
    """Takes only what an attention op takes; returns q."""

    head_size = HEAD_DIM

    def forward(self, q, k, v):
        assert q.shape[-1] == LAYOUT.op_heads * HEAD_DIM
        return q


class Rotary(nn.Module):
    """As vLLM's kernel for CUDA, refuses heads that do not come out even; adds 1 and 2."""

    def forward(self, positions, q, k):
        assert q.shape[-1] % k.shape[-1] == 0
        return q + 1, k + 2


@pytest.mark.parametrize("fused", [None, False, True])
def test_query_heads_are_spread_once(fused):
    groups = UnevenGroups(Op(), LAYOUT, 0)
    attention = SimpleNamespace(rotary_emb=Rotary(), attn=groups)
    if fused is not None:  # Qwen3-Next says whether its fused kernel rotates
        attention.use_fused_qk_norm_rope_gate = fused
    rotary = attention.rotary_emb
    _spread_before_rotary(attention)
    q, k = torch.arange(8.0).view(1, -1), torch.arange(4.0).view(1, -1)
    if fused:
        assert attention.rotary_emb is rotary, "its tables are read where they are"
        assert torch.equal(groups(q, k, k), q)
    else:
        assert isinstance(attention.rotary_emb, SpreadRotary)
        rotated, key = attention.rotary_emb(None, q, k)
        assert rotated.shape[-1] == LAYOUT.op_heads * HEAD_DIM and torch.equal(key, k + 2)
        assert torch.equal(groups(rotated, key, k), q + 1)


def test_a_layer_that_rotates_nothing_stays_as_it_is():
    attention = SimpleNamespace(attn=UnevenGroups(Op(), LAYOUT, 0))
    _spread_before_rotary(attention)
    assert not hasattr(attention, "rotary_emb")
