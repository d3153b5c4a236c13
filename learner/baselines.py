"""What a learned mask has to beat: the same budget in every layer, units chosen by weight norm or by chance."""

from collections.abc import Mapping

import torch
from torch import nn

from learner.units import Units, Values


def magnitude(model: nn.Module, units: Units, target_sparsity: Mapping[str, float]) -> Values:
    """Keeps the units with the largest L2 norm over all weights that would go with them.

    `target_sparsity` is the share to remove, by kind. Returns 1 for units that stay and 0 for others.
    """

    def squares(weight: torch.Tensor, count: int) -> torch.Tensor:  # [count], `weight` [count * rows, columns]
        return weight.detach().float().square().reshape(count, -1).sum(1)

    def scores(kind: str, *projections: torch.Tensor) -> torch.Tensor:
        return sum(squares(weight, units.widths[kind]) for weight in projections)

    def score_heads(layer: nn.Module) -> torch.Tensor:
        attention = layer.self_attn
        projections = (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
        return scores("head", *projections, attention.o_proj.weight.T)

    def score_channels(layer: nn.Module) -> torch.Tensor:
        mlp = layer.mlp
        return scores("channel", mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T)

    def score_experts(layer: nn.Module) -> torch.Tensor:
        experts = layer.mlp.experts  # gate_up_proj [experts, 2 * width, hidden_size], gate before up
        gate, up = experts.gate_up_proj.chunk(2, dim=1)
        return scores("expert", gate, up, experts.down_proj.transpose(1, 2))

    score = {"head": score_heads, "channel": score_channels, "expert": score_experts}
    layers = model.model.layers
    scores_by_kind = {
        kind: torch.stack([score[kind](layers[index]) for index in indices]).cpu()
        for kind, indices in units.layers.items()
    }
    return {kind: _largest_in_each_layer(each, target_sparsity[kind]) for kind, each in scores_by_kind.items()}


def random(units: Units, target_sparsity: Mapping[str, float], seed: int) -> Values:
    """Keeps units drawn at random. Takes and returns what `magnitude` does."""
    generator = torch.Generator().manual_seed(seed)
    return {
        kind: _largest_in_each_layer(torch.rand(units.shape(kind), generator=generator), target_sparsity[kind])
        for kind in units.layers
    }


def _largest_in_each_layer(scores: torch.Tensor, target_sparsity: float) -> torch.Tensor:
    kept = max(1, round(scores.shape[1] * (1 - target_sparsity)))
    return torch.zeros_like(scores).scatter(1, scores.topk(kept, dim=1).indices, 1)
