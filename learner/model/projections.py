"""Weights of projections on a running model, whether each is a module or several are rows of a fused one (Phi-3)."""

from typing import Any

import torch


def query_key_value_weights(attention: Any) -> tuple[torch.Tensor, ...]:
    """W_Q [query heads * head_dim, hidden_size], W_K and W_V [KV heads * head_dim, hidden_size]."""
    if hasattr(attention, "q_proj"):
        return attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight
    fused, query_rows = attention.qkv_proj.weight, attention.o_proj.weight.shape[1]
    key_value_rows = (len(fused) - query_rows) // 2
    return fused.split([query_rows, key_value_rows, key_value_rows])


def gate_up_weights(mlp: Any) -> tuple[torch.Tensor, ...]:
    """W_gate and W_up [intermediate_size, hidden_size]."""
    if hasattr(mlp, "gate_proj"):
        return mlp.gate_proj.weight, mlp.up_proj.weight
    return mlp.gate_up_proj.weight.chunk(2)


def is_fused(model: Any) -> bool:
    """Whether a layer of this ...ForCausalLM has one module for q, k and v."""
    return any(hasattr(getattr(layer, "self_attn", None), "qkv_proj") for layer in model.model.layers)
