"""Llama's and Mistral's forward pass in float64, written out, with what pruning projects multiply into it.

It shares no code with the converter, learn-masks or Transformers: importers are held to it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

Tensors = Mapping[str, torch.Tensor]


@dataclass
class Rules:
    """What a project does to a Llama. A mask that is missing multiplies nothing.

    Attributes:
        heads, channels: masks by layer, [query heads] and [FFN channels].
        both: channel masks multiply the gate and the up projection, before the activation; else the up projection.
        attention, mlp: what multiplies all that a sublayer adds, by layer.
        embedding, outputs, norms: masks [hidden_size] of the embedding's output, of what sublayers add, and of what
            every norm returns.
        divisor: what norms divide the sum of squares by; None for the number of dimensions that they sum.
        summed: bool [hidden_size], the dimensions that norms sum; None for all.
    """

    heads: dict[int, torch.Tensor] = field(default_factory=dict)
    channels: dict[int, torch.Tensor] = field(default_factory=dict)
    both: bool = True
    attention: dict[int, float] = field(default_factory=dict)
    mlp: dict[int, float] = field(default_factory=dict)
    embedding: torch.Tensor | None = None
    outputs: torch.Tensor | None = None
    norms: torch.Tensor | None = None
    divisor: float | None = None
    summed: torch.Tensor | None = None


def logits(tensors: Tensors, head_dim: int, tokens: list[int], rules: Rules, eps: float = 1e-4) -> torch.Tensor:
    """[len(tokens), vocabulary], of a model with these tensors by Hugging Face's names; layers may lack sublayers."""
    weights = {name: tensor.double() for name, tensor in tensors.items()}

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        summed = x if rules.summed is None else x[:, rules.summed]
        mean = (summed**2).sum(1, keepdim=True) / (rules.divisor or summed.shape[1])
        return times(x / (mean + eps).sqrt() * weights[f"{name}.weight"], rules.norms)

    x = times(weights["model.embed_tokens.weight"][tokens], rules.embedding)
    for layer in range(1 + max(int(name.split(".")[2]) for name in weights if ".layers." in name)):
        prefix = f"model.layers.{layer}."
        if f"{prefix}self_attn.q_proj.weight" in weights:
            normed = norm(x, f"{prefix}input_layernorm")
            q, k, v = (normed @ weights[f"{prefix}self_attn.{name}_proj.weight"].T for name in "qkv")
            heads = times(attend(q, k, v, head_dim), rules.heads.get(layer), axis=0)
            added = heads.transpose(0, 1).flatten(1) @ weights[f"{prefix}self_attn.o_proj.weight"].T
            x = x + times(added, rules.outputs) * rules.attention.get(layer, 1)
        if f"{prefix}mlp.up_proj.weight" in weights:
            normed, mask = norm(x, f"{prefix}post_attention_layernorm"), rules.channels.get(layer)
            gate, up = (normed @ weights[f"{prefix}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
            product = silu(times(gate, mask) if rules.both else gate) * times(up, mask)
            added = product @ weights[f"{prefix}mlp.down_proj.weight"].T
            x = x + times(added, rules.outputs) * rules.mlp.get(layer, 1)
    return norm(x, "model.norm") @ weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).T


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Causal attention with rotary positions; [tokens, heads * head_dim] -> [query heads, tokens, head_dim]."""
    q, k, v = (x.unflatten(1, (-1, head_dim)).transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(len(q) // len(k), dim=0) for x in (k, v))
    scores = rotated(q) @ rotated(k).transpose(1, 2) / head_dim**0.5
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v


def rotated(x: torch.Tensor) -> torch.Tensor:
    """[heads, tokens, head_dim], each pair of dimensions i and i + head_dim / 2 turned by position / 10000^(2i / d)."""
    half = x.shape[2] // 2
    angles = torch.arange(x.shape[1]).double()[:, None] * 10000 ** (-torch.arange(half).double() / half)
    first, second = x[..., :half], x[..., half:]
    return torch.cat(
        (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), dim=-1
    )


def silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + (-x).exp())


def times(x: torch.Tensor, mask: torch.Tensor | None, axis: int = -1) -> torch.Tensor:
    """`x` with its last axis, or the first one, multiplied by a mask."""
    if mask is None:
        return x
    return x * (mask.double() if axis == -1 else mask.double()[:, None, None])
