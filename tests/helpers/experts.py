"""Transformers' experts and routers, whatever their layout: what tests that write formulas out read of them."""

from typing import Any

import torch


def router_of(mlp: Any) -> Any:
    """The router: its module has another name in gpt-oss."""
    return mlp.gate if hasattr(mlp, "gate") else mlp.router


def gate_and_up(experts: Any, expert: int, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What an expert's first two projections make of states [tokens, hidden_size]."""
    weight = experts.gate_up_proj[expert]
    if not hasattr(experts, "gate_up_proj_bias"):
        gate, up = (states @ weight.T).chunk(2, dim=-1)
        return gate, up
    both = states @ weight + experts.gate_up_proj_bias[expert]
    return both[..., 0::2], both[..., 1::2]


def product_of(experts: Any, expert: int, states: torch.Tensor) -> torch.Tensor:
    """What its down projection reads."""
    gate, up = gate_and_up(experts, expert, states)
    if not hasattr(experts, "gate_up_proj_bias"):
        return torch.nn.functional.silu(gate) * up
    gate, up = gate.clamp(max=7), up.clamp(-7, 7)
    return gate * (1.702 * gate).sigmoid() * (up + 1)


def down_of(experts: Any, expert: int) -> torch.Tensor:
    """The weight of its down projection [hidden_size, width]."""
    weight = experts.down_proj[expert]
    return weight.T if hasattr(experts, "down_proj_bias") else weight


def output_of(experts: Any, expert: int, product: torch.Tensor) -> torch.Tensor:
    """What its down projection makes of a product [tokens, width]."""
    output = product @ down_of(experts, expert).T
    return output + experts.down_proj_bias[expert] if hasattr(experts, "down_proj_bias") else output
