"""Wanda's scores on whole structures: a baseline that looks at text, but takes no gradients.

Wanda (arXiv 2306.11695) scores a weight by |W_ij| ||X_j||: its size times the L2 norm of the input feature j that it
reads, over calibration text. Here a unit is scored by the sum over all weights that read it, as in the structured
variant that FLAP compares with (arXiv 2312.11983): the columns of o_proj that belong to a head, the column of down_proj
that belongs to a channel, for experts over the tokens that the router sends there. The largest stay, the same number in
each layer.

    learn-masks MODEL ckpt/ --method wanda --sparsity 0.5 --data text/*.txt
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from learner.methods.baselines import keep_largest_in_each_layer
from learner.methods.method import Learned, Task
from learner.model.expert_weights import expert_weights, watch_products
from pruned_vllm.common.progress import progress_bar


def learn(task: Task) -> Learned:
    """Masks of 0 and 1; see learner/methods/method.py."""
    return Learned(keep_largest_in_each_layer(task, scores(task)))


@torch.no_grad()
def scores(task: Task) -> dict[str, torch.Tensor]:
    """Scores float32 [layers, units] by kind, on the CPU.

    Layers see the text as the dense model does: what is chosen in one layer does not change the next.
    """
    units, accelerator, layers = task.units, task.accelerator, task.model.model.layers
    sequences = task.text.calibration(task.settings.calibration_sequences, accelerator.print)
    share = sequences.tensor_split(accelerator.num_processes)[accelerator.process_index]
    with _squared_norms(layers, units.layers) as squares:
        for sequence in progress_bar(share, desc="wanda", unit="sequence", disable=not accelerator.is_main_process):
            task.model.model(input_ids=sequence[None].to(accelerator.device), use_cache=False)
    found = {}
    for kind, indices in units.layers.items():
        features = [
            accelerator.reduce(squares[kind][index]).sqrt() * _column_sums(kind, layers[index]) for index in indices
        ]
        found[kind] = torch.stack([feature.reshape(units.widths[kind], -1).sum(1) for feature in features]).cpu()
    return found


def _column_sums(kind: str, layer: Any) -> torch.Tensor:
    """Sums of |W| over the outputs: [inputs], for experts [experts, inputs]."""
    if kind == "expert":
        return torch.stack([down.float().abs().sum(0) for _, _, down in expert_weights(layer.mlp.experts)])
    return _reader(kind, layer).weight.float().abs().sum(0)


def _reader(kind: str, layer: Any) -> nn.Linear:
    return layer.self_attn.o_proj if kind == "head" else layer.mlp.down_proj


@contextmanager
def _squared_norms(layers: nn.ModuleList, indices: dict[str, tuple[int, ...]]) -> Iterator[dict]:
    """By kind and layer, the squares of ||X_j|| of all that the model reads while the block runs.

    float32, of the shape of `_column_sums`.
    """
    squares = {
        kind: {index: torch.zeros_like(_column_sums(kind, layers[index])) for index in of_kind}
        for kind, of_kind in indices.items()
    }
    with ExitStack() as stack:
        for kind, totals in squares.items():
            for index, total in totals.items():
                for handle in _add_squares(kind, layers[index], total):
                    stack.callback(handle.remove)
        yield squares


def _add_squares(kind: str, layer: Any, total: torch.Tensor) -> list[RemovableHandle]:
    def add(total: torch.Tensor, inputs: torch.Tensor) -> None:
        total.add_(inputs.float().square().flatten(0, -2).sum(0))

    if kind == "expert":
        return watch_products(layer.mlp.experts, lambda expert, inputs: add(total[expert], inputs))
    return [_reader(kind, layer).register_forward_pre_hook(lambda module, args: add(total, args[0]))]
