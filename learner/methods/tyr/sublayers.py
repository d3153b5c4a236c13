"""What Tyr-the-Pruner prunes: linear layers whose inputs are the outputs of units, and what they read.

A sublayer is the o_proj of a layer (its units are heads), the down_proj of a dense MLP (channels), or that of one
routed expert. The paper knows no experts. An expert's output is multiplied by its router weight, which here counts as
part of the input: so H weighs each token as the sum over experts does.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from learner.model.expert_weights import down_weight, routed_products
from learner.model.units import Units


@dataclass(frozen=True)
class Sublayer:
    """One linear layer.

    Attributes:
        kind: of its units, as in `Units`.
        layer: index of the decoder layer.
        expert: index of the routed expert; None in others.
        row, first_unit: where its units are in `values[kind]`: row, and first of `num_units` columns.
    """

    kind: str
    layer: int
    expert: int | None
    row: int
    first_unit: int
    num_units: int

    @property
    def name(self) -> str:
        return self.kind if self.expert is None else f"{self.kind}{self.expert}"

    def weight(self, block: Any) -> torch.Tensor:
        """[hidden_size, inputs] of this decoder layer, to read or to write to."""
        if self.kind == "head":
            return block.self_attn.o_proj.weight.data
        if self.expert is None:
            return block.mlp.down_proj.weight.data
        return down_weight(block.mlp.experts, self.expert).data


def sublayers_of(units: Units) -> list[Sublayer]:
    """All sublayers in the order of the decoder layers."""
    sublayers = []
    for kind, layers in units.layers.items():
        experts = range(units.num_experts) if kind == "expert" else [None]
        size = units.widths[kind] // len(experts)
        sublayers += [
            Sublayer(kind, layer, expert, row, (expert or 0) * size, size)
            for row, layer in enumerate(layers)
            for expert in experts
        ]
    return sorted(sublayers, key=lambda sublayer: sublayer.layer)


@contextmanager
def collect_hessians(block: Any, sublayers: Sequence[Sublayer]) -> Iterator[dict[str, torch.Tensor]]:
    """While it runs, adds up H = X^T X of what these sublayers of `block` read, in all its forward passes.

    Yields float32 [inputs, inputs] on the block's device by name of the sublayer.
    """
    hessians = {}
    with ExitStack() as stack:
        for sublayer in sublayers:
            weight = sublayer.weight(block)
            hessians[sublayer.name] = torch.zeros(2 * (weight.shape[1],), device=weight.device)
            if sublayer.expert is None:
                module = block.self_attn.o_proj if sublayer.kind == "head" else block.mlp.down_proj
                hook = partial(_add_inputs, hessians[sublayer.name])
                stack.callback(module.register_forward_pre_hook(hook).remove)
        experts = {sublayer.expert: hessians[sublayer.name] for sublayer in sublayers if sublayer.expert is not None}
        if experts:
            hook = partial(_add_inputs_of_experts, experts)
            stack.callback(block.mlp.experts.register_forward_pre_hook(hook).remove)
        yield hessians


def _add_inputs(hessian: torch.Tensor, module: nn.Module, args: tuple[torch.Tensor]) -> None:
    x = args[0].flatten(0, -2).float()
    hessian.addmm_(x.T, x)


def _add_inputs_of_experts(hessians: dict[int, torch.Tensor], experts: Any, args: tuple[torch.Tensor, ...]) -> None:
    """`args` are hidden states [tokens, hidden_size], and for each token its experts and their weights [tokens, k]."""
    for expert, product, weights in routed_products(experts, args):
        if expert in hessians:
            _add_inputs(hessians[expert], experts, (product * weights[:, None],))
