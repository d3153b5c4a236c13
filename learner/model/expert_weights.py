"""The routed experts of a layer on a running model, in either of two layouts.

Transformers holds all experts of a layer in two tensors, gate_up_proj [experts, 2 * width, hidden_size] (gate before
up) and down_proj [experts, hidden_size, width]. In gpt-oss both are transposed, gate and up take turns, and there are
biases; the experts say so themselves. Code that a checkpoint brings holds a list of MLPs.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


def expert_weights(experts: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """W_gate and W_up [width, hidden_size] and W_down [hidden_size, width] of each expert."""
    if isinstance(experts, nn.ModuleList):
        mlp: Any
        for mlp in experts:
            yield mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
    else:
        for expert, gate_up in enumerate(experts.gate_up_proj):
            rows = gate_up.T if experts.is_transposed else gate_up
            gate, up = rows.chunk(2) if experts.is_concatenated else (rows[::2], rows[1::2])
            yield gate, up, down_weight(experts, expert)


def down_weight(experts: Any, expert: int) -> torch.Tensor:
    """W_down [hidden_size, width] of one of Transformers' experts, a view of what it holds."""
    weight = experts.down_proj[expert]
    return weight.T if experts.is_transposed else weight


def output_of(experts: Any, expert: int, product: torch.Tensor) -> torch.Tensor:
    """What one of Transformers' experts makes of what its W_down reads: [tokens, width] -> [tokens, hidden_size]."""
    output = product @ down_weight(experts, expert).T
    return output + experts.down_proj_bias[expert] if experts.has_bias else output


def watch_products(experts: Any, see: Callable[[int, torch.Tensor], None]) -> list[RemovableHandle]:
    """Lets `see(expert, inputs)` have what W_down reads in every forward pass, [tokens of that expert, width].

    Experts that no token was sent to may be left out.
    """
    if isinstance(experts, nn.ModuleList):
        projections: list[Any] = [mlp.down_proj for mlp in experts]
        return [
            projection.register_forward_pre_hook(lambda module, args, expert=expert: see(expert, args[0]))
            for expert, projection in enumerate(projections)
        ]

    def recompute(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        for expert, product, _ in routed_products(module, args):
            see(expert, product)

    return [experts.register_forward_pre_hook(recompute)]


def routed_products(experts: Any, args: tuple[torch.Tensor, ...]) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """What W_down reads, computed anew from what Transformers' experts are called with, for each expert that any token
    is sent to: its number, [tokens of that expert, width], and the weight of each token's output [tokens]."""
    hidden_states, chosen, weights = args  # [tokens, hidden_size], [tokens, experts that a token takes], their weights
    for expert in chosen.unique().tolist():
        token, place = torch.where(chosen == expert)
        weight = experts.gate_up_proj[expert]
        gate_up = hidden_states[token] @ (weight if experts.is_transposed else weight.T)
        if experts.has_bias:
            gate_up = gate_up + experts.gate_up_proj_bias[expert]
        yield expert, experts._apply_gate(gate_up), weights[token, place]
