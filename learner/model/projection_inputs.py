"""Moments of what o_proj and down_proj read: the outputs of heads, and the products in MLPs and experts.

Calibration methods score a unit by the weights that read it, and by what these read.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from learner.methods.method import Task
from learner.model.expert_weights import expert_weights, watch_products


@torch.no_grad()
def input_moments(task: Task, title: str) -> dict[str, dict[int, torch.Tensor]]:
    """By kind and layer float64 [3, inputs], for experts [3, experts, inputs]: number of tokens, and over them the sums
    of what is read and of its squares, on the device of the layer.

    The calibration sequences go through the dense model: what is chosen in one layer does not change the next. Experts
    read what the router sends to them.
    """
    units, accelerator, layers = task.units, task.accelerator, task.model.model.layers
    with _watched(layers, units.layers) as found:
        for tokens in task.calibration(title):
            task.model.model(input_ids=tokens, use_cache=False)
    return {
        kind: {index: accelerator.reduce(moments) for index, moments in of_kind.items()}
        for kind, of_kind in found.items()
    }


def reading_weight(kind: str, layer: Any) -> torch.Tensor:
    """What reads units of this kind, float32: [outputs, inputs], for experts [experts, outputs, inputs]."""
    if kind == "expert":
        return torch.stack([down.float() for _, _, down in expert_weights(layer.mlp.experts)])
    return _reader(kind, layer).weight.float()


def _reader(kind: str, layer: Any) -> nn.Linear:
    return layer.self_attn.o_proj if kind == "head" else layer.mlp.down_proj


@contextmanager
def _watched(layers: nn.ModuleList, indices: dict[str, tuple[int, ...]]) -> Iterator[dict[str, dict]]:
    """What `input_moments` returns, of all that the model reads while the block runs."""
    found: dict[str, dict[int, torch.Tensor]] = {}
    with ExitStack() as stack:
        for kind, of_kind in indices.items():
            found[kind] = {}
            for index in of_kind:
                weight = reading_weight(kind, layers[index])
                shape = (3, *weight.shape[:-2], weight.shape[-1])
                found[kind][index] = moments = torch.zeros(shape, dtype=torch.float64, device=weight.device)
                for handle in _add_up(kind, layers[index], moments):
                    stack.callback(handle.remove)
        yield found


def _add_up(kind: str, layer: Any, moments: torch.Tensor) -> list[RemovableHandle]:
    def add(moments: torch.Tensor, inputs: torch.Tensor) -> None:
        tokens = inputs.flatten(0, -2).double()
        moments[0] += len(tokens)
        moments[1] += tokens.sum(0)
        moments[2] += tokens.square().sum(0)

    if kind == "expert":
        return watch_products(layer.mlp.experts, lambda expert, inputs: add(moments[:, expert], inputs))
    return [_reader(kind, layer).register_forward_pre_hook(lambda module, args: add(moments, args[0]))]
