"""Wanda's scores on whole structures: a baseline that looks at text, but takes no gradients.

Wanda (arXiv 2306.11695) scores a weight by |W_ij| ||X_j||: its size times the L2 norm of the input feature j that it
reads, over calibration text. Here a unit is scored by the sum over all weights that read it, as in the structured
variant that FLAP compares with (wanda-sp, arXiv 2312.11983): the columns of o_proj that belong to a head, the column of
down_proj that belongs to a channel, for experts over the tokens that the router sends there. The largest stay, the same
number in each layer.

    learn-masks MODEL ckpt/ --method wanda --sparsity 0.5 --data text/*.txt
"""

import torch

from learner.methods.baselines import keep_largest_in_each_layer
from learner.methods.method import Learned, Task
from learner.model.projection_inputs import input_moments, reading_weight


def learn(task: Task) -> Learned:
    """Masks of 0 and 1; see learner/methods/method.py."""
    return keep_largest_in_each_layer(task, scores(task))


@torch.no_grad()
def scores(task: Task) -> dict[str, torch.Tensor]:
    """Scores float32 [layers, units] by kind, on the CPU."""
    units, layers, found = task.units, task.model.model.layers, {}
    for kind, by_layer in input_moments(task, "wanda").items():
        features = [
            squares.sqrt().float() * reading_weight(kind, layers[index]).abs().sum(-2)
            for index, (_, _, squares) in by_layer.items()
        ]
        found[kind] = torch.stack([feature.reshape(units.widths[kind], -1).sum(1).cpu() for feature in features])
    return found
