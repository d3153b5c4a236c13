"""Second-order pruning of one layer, against dense linear algebra in float64."""

import pytest
import torch

from learner.methods.tyr.pruning import DAMPING, damped, prune, remove, saliency

INPUTS, OUTPUTS, TOKENS = 24, 7, 200


def layer(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated inputs [tokens, inputs] and a weight [outputs, inputs], float64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(INPUTS, INPUTS, generator=generator, dtype=torch.float64)
    x = torch.randn(TOKENS, INPUTS, generator=generator, dtype=torch.float64) @ mixing
    return x, torch.randn(OUTPUTS, INPUTS, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("num_units", [24, 6])
def test_what_stays_is_the_least_squares_solution(num_units):
    """The damping is that of rows sqrt(damping) I below X."""
    x, weight = layer()
    damping = DAMPING * (x.T @ x).diagonal().mean()
    rows = torch.cat((x, damping.sqrt() * torch.eye(INPUTS, dtype=x.dtype)))
    candidates = prune(weight, x.T @ x, num_units, [5, 1, 3], units_per_round=2)
    assert sorted(candidates) == [1, 3, 5]
    for count, candidate in candidates.items():
        assert (~candidate.kept).sum() == count
        inputs = candidate.kept.repeat_interleave(INPUTS // num_units)
        solution = torch.linalg.lstsq(rows[:, inputs], rows @ weight.T).solution
        torch.testing.assert_close(candidate.weight, solution.T, rtol=1e-8, atol=1e-8)
    assert not (candidates[5].kept & ~candidates[1].kept).any(), "larger sparsities come from smaller ones"


def test_removal_leaves_the_inverse_and_the_solution_of_the_rest():
    x, weight = layer()
    hessian = damped(x.T @ x)
    remaining, inverse = weight.T.clone(), torch.linalg.inv(hessian)
    for gone in ([3], [0, 20, 7]):
        remove(remaining, inverse, torch.tensor(gone))
    left = [i for i in range(INPUTS) if i not in (3, 0, 20, 7)]
    part = hessian[left][:, left]
    torch.testing.assert_close(inverse[left][:, left], torch.linalg.inv(part), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(remaining[left], torch.linalg.solve(part, (hessian @ weight.T)[left]))
    assert (
        not inverse[[3, 0, 20, 7]].any() and not inverse[:, [3, 0, 20, 7]].any() and not remaining[[3, 0, 20, 7]].any()
    )


def test_saliency_is_equation_4():
    """The second-order term is the error of the best solution without the unit."""
    x, weight = layer()
    hessian = x.T @ x
    gradient, kept = hessian @ weight.T, torch.ones(6, dtype=torch.bool)
    kept[2] = False
    inverse = torch.linalg.inv(hessian)
    found = saliency(weight.T, gradient, inverse, kept)
    for unit in range(6):
        inputs = torch.arange(INPUTS).view(6, -1)[unit]
        others = [i for i in range(INPUTS) if i not in inputs]
        best = torch.linalg.lstsq(x[:, others], x @ weight.T).solution
        error = (x[:, others] @ best - x @ weight.T).square().sum() / 2
        expected = error + (gradient[inputs] * weight.T[inputs]).abs().sum()
        assert found[unit].item() == pytest.approx(expected.item() if unit != 2 else torch.inf, rel=1e-6)


def test_a_redundant_unit_goes_first_and_its_twin_takes_over():
    """Units 1 and 4 see the same and nearly cancel; the largest weights of all are theirs."""
    x, weight = layer()
    x = torch.linalg.qr(x).Q
    x[:, 4] = x[:, 1]
    weight /= weight.norm(dim=0)
    weight[:, 1] *= 2
    weight[:, 4] = 0.02 * weight[:, 0] - weight[:, 1]
    candidates = prune(weight, x.T @ x, INPUTS, [1, 2], units_per_round=1)
    gone = [set((~candidate.kept).nonzero().flatten().tolist()) for candidate in candidates.values()]
    assert gone[0] < {1, 4} and gone[1] == {1, 4}
    pruned = torch.zeros_like(weight)
    pruned[:, candidates[1].kept] = candidates[1].weight
    torch.testing.assert_close(x @ pruned.T, x @ weight.T, rtol=0, atol=0.02)
    assert pruned[:, [1, 4]].norm() < 1, "the twin has both weights now, which cancel"


def test_inputs_that_are_never_seen():
    """Without any input norms decide and weights stay; a dead input among others goes first."""
    _, weight = layer()
    candidate = prune(weight, torch.zeros(INPUTS, INPUTS, dtype=weight.dtype), INPUTS, [20], 16)[20]
    assert set(candidate.kept.nonzero().flatten().tolist()) == set(weight.norm(dim=0).topk(4).indices.tolist())
    torch.testing.assert_close(candidate.weight, weight[:, candidate.kept])
    x, weight = layer()
    x[:, 5] = 0
    assert not prune(weight, x.T @ x, INPUTS, [1], 1)[1].kept[5]


def test_everything_may_go():
    x, weight = layer()
    assert prune(weight, x.T @ x, 6, [6], 1)[6].weight.shape == (OUTPUTS, 0)
    assert prune(weight, x.T @ x, 6, [], 1) == {}
