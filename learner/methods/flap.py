"""FLAP's scores (arXiv 2312.11983): a baseline that removes what changes little from token to token.

A feature that is the same for every token is a constant, which can do without its weights. So FLAP scores the input
feature j of o_proj and down_proj by its variance over the calibration text, times the squared L2 norm of the weights
that read it:

    S_j = Var(X_j) ||W_:j||^2

Scores are standardized in each layer, (S - mean) / standard deviation; a head has the mean over its features. Then the
units with the largest scores of the whole model stay, so that layers lose different shares.

One thing is left out. FLAP adds what the removed features are on average, W_:j mean(X_j), to a bias; masks cannot, and
most models have no such biases (`convert-pruned --from flap` takes those of FLAP's own output). It lets heads and
channels compete, as --target-parameters does here; with --sparsity each kind loses its share. Experts are our
extension: the variance is over the tokens that the router sends to an expert.
"""

import torch

from learner.methods.baselines import keep_largest
from learner.methods.method import Learned, Task
from learner.model.projection_inputs import input_moments, reading_weight


def learn(task: Task) -> Learned:
    """Masks of 0 and 1; see learner/methods/method.py."""
    return keep_largest(task, scores(task))


@torch.no_grad()
def scores(task: Task) -> dict[str, torch.Tensor]:
    """Standardized scores float32 [layers, units] by kind, on the CPU."""
    units, layers, found = task.units, task.model.model.layers, {}
    for kind, by_layer in input_moments(task, "flap").items():
        rows = []
        for index, (count, total, squares) in by_layer.items():
            variance = (squares - total.square() / count.clamp(min=1)) / (count - 1).clamp(min=1)
            norms = reading_weight(kind, layers[index]).double().square().sum(-2)
            features = (variance.clamp(min=0) * norms).flatten()  # below 0 by rounding alone
            standard = (features - features.mean()) / features.std().clamp(min=torch.finfo(torch.float64).tiny)
            rows.append(standard.view(units.widths[kind], -1).mean(1).float().cpu())
        found[kind] = torch.stack(rows)
    return found
