"""Taylor scores as in LLM-Pruner (arXiv 2305.11627): a baseline that asks gradients what a unit is worth.

What the loss gains when a weight goes is to first order |dL/dW W|. LLM-Pruner adds that up over all weights that go
together, which is a unit's score: rows of q, k, v, gate and up, columns of o_proj and down_proj. L is the mean
cross-entropy of the calibration text (here of a sequence of it, which changes no order). The largest stay, the same
number in each layer. LLM-Pruner also spares the first and last layers, which is left out here. Experts are our
extension.

    learn-masks MODEL ckpt/ --method taylor --sparsity 0.5 --data text/*.txt

It needs memory for gradients of all decoder layers, as much as their weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from learner.methods.baselines import keep_largest_in_each_layer, sums_over_weights
from learner.methods.method import Learned, Task
from learner.model.loss import next_token_loss, run_without_head


def learn(task: Task) -> Learned:
    """Masks of 0 and 1; see learner/methods/method.py."""
    return keep_largest_in_each_layer(task, scores(task))


def scores(task: Task) -> dict[str, torch.Tensor]:
    """Scores float32 [layers, units] by kind, on the CPU."""
    accelerator, model = task.accelerator, task.model
    with _trained(model.model.layers) as weights:
        for tokens in task.calibration("taylor"):
            loss = next_token_loss(model, tokens, run_without_head(model, tokens).last_hidden_state)
            # Times the length: its scale changes no order, and float16 rounds gradients of a mean to zero.
            (loss * (tokens.numel() / task.settings.calibration_sequences)).backward()
        with _replaced_by_products(weights, accelerator):
            return sums_over_weights(task, torch.abs, "taylor, sums")


@contextmanager
def _trained(layers: Any) -> Iterator[list[nn.Parameter]]:
    """Weights of `layers`, which get gradients while the block runs."""
    weights = [parameter for parameter in layers.parameters() if parameter.ndim > 1]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield weights
    finally:
        for weight in weights:
            weight.requires_grad_(False)
            weight.grad = None


@contextmanager
def _replaced_by_products(weights: list[nn.Parameter], accelerator: Any) -> Iterator[None]:
    """While the block runs, every weight holds its product with its gradient: so both are cut into units alike."""
    before = [weight.data for weight in weights]
    try:
        for weight in weights:
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
            weight.data = accelerator.reduce(gradient).mul_(weight.data)
        yield
    finally:
        for weight, data in zip(weights, before, strict=True):
            weight.data = data
