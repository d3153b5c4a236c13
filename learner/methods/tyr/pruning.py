"""Second-order pruning of one linear layer with a new solution for the weights that stay. Tensors in, tensors out.

A layer W maps inputs X to XW. Which units (heads, channels: groups of input columns) can go so that XW changes least,
and what must the others' weights be then? With H = X^T X the change is quadratic in W, so that no backward pass is
needed (arXiv 2503.09657, equations 2 to 4):

    G = H W                                                                        (3)
    saliency of unit p:  sum |G_p * W_p|  +  1/2 W_p^T ([H^-1]_pp)^-1 W_p          (4)
    W    <- W    - H^-1[:, p] ([H^-1]_pp)^-1 W_p           weights of the others answer
    H^-1 <- H^-1 - H^-1[:, p] ([H^-1]_pp)^-1 H^-1[p, :]    (10)

Units go in rounds, one head or 16 channels in each, and saliencies are computed anew between rounds, as the paper
says. (The authors' code removes all heads in one round and channels in 16 rounds of equal size, and leaves out the
absolute value in (4).) One run yields all wanted sparsities, the larger ones from the smaller. At each of them the
weights are solved for once more, W_K = (H_KK)^-1 G_K for the inputs K that are left, so that rounding does not add up.

H has 1 % of the mean of its diagonal added to the diagonal. As G is made of the same H, the solution minimises
|XW - XW'|^2 + damping |W - W'|^2 over W' that are zero outside of K; inputs that were never seen keep their weights.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch

DAMPING = 1e-2  # of the mean of H's diagonal


class Candidate(NamedTuple):
    """A pruned linear layer.

    Attributes:
        kept: bool [units].
        weight: float32 [outputs, inputs of the kept units].
    """

    kept: torch.Tensor
    weight: torch.Tensor


def damped(hessian: torch.Tensor) -> torch.Tensor:
    """H with its damping; the identity where there was no input, so that norms decide and the weights stay."""
    mean = hessian.diagonal().mean()
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    return identity if mean == 0 else hessian + DAMPING * mean * identity


def prune(
    weight: torch.Tensor, hessian: torch.Tensor, num_units: int, counts: Iterable[int], units_per_round: int
) -> dict[int, Candidate]:
    """The layer without so many units, for each of `counts`.

    Args:
        weight: [outputs, inputs]; a unit is inputs // num_units neighbouring inputs.
        hessian: X^T X [inputs, inputs] float32 (or float64: then all is computed so), without damping.
        counts: numbers of units to remove, each at most `num_units`.
        units_per_round: units that go before saliencies are computed again.
    """
    hessian = damped(hessian)
    dense = weight.to(hessian.dtype).T
    gradient = hessian @ dense
    remaining, inverse = dense.clone(), torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    kept, removed = torch.ones(num_units, dtype=torch.bool, device=weight.device), 0
    inputs = torch.arange(len(dense), device=weight.device).view(num_units, -1)  # of each unit
    candidates = {}
    for count in sorted(counts):
        while removed < count:
            gone = saliency(remaining, gradient, inverse, kept).topk(
                min(units_per_round, count - removed), largest=False
            )
            remove(remaining, inverse, inputs[gone.indices].flatten())
            kept[gone.indices] = False
            removed += len(gone.indices)
        candidates[count] = Candidate(kept.clone(), refit(hessian, gradient, inputs[kept].flatten()))
    return candidates


def saliency(weight: torch.Tensor, gradient: torch.Tensor, inverse: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Equation (4) for each unit, [units]; infinite for those that are gone.

    Args:
        weight, gradient: W as it is now and G, [inputs, outputs].
        inverse: H^-1 [inputs, inputs] of the inputs that are left, zero elsewhere.
        kept: bool [units].
    """
    units, size = len(kept), len(weight) // len(kept)
    blocks = inverse.view(units, size, units, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()
    blocks[~kept] = torch.eye(
        size, dtype=inverse.dtype, device=inverse.device
    )  # blocks of removed units have no inverse
    weight, gradient = weight.view(units, size, -1), gradient.view(units, size, -1)
    second_order = (weight * (torch.linalg.inv(blocks) @ weight)).sum((1, 2)) / 2
    return (second_order + (gradient * weight).abs().sum((1, 2))).masked_fill(~kept, torch.inf)


def remove(weight: torch.Tensor, inverse: torch.Tensor, inputs: torch.Tensor) -> None:
    """Takes `inputs` (indices) out of W [inputs, outputs] and H^-1 [inputs, inputs], in place; their rows become 0."""
    rows = inverse[inputs]
    solved = torch.linalg.solve(rows[:, inputs], torch.cat((weight[inputs], rows), dim=1))
    weight -= rows.T @ solved[:, : weight.shape[1]]
    inverse -= rows.T @ solved[:, weight.shape[1] :]
    weight[inputs] = 0
    inverse[inputs], inverse[:, inputs] = 0, 0


def refit(hessian: torch.Tensor, gradient: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """Least squares over these inputs alone: weights [outputs, len(inputs)]."""
    factor = torch.linalg.cholesky(hessian[inputs][:, inputs])
    return torch.cholesky_solve(gradient[inputs], factor).T
