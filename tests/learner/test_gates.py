"""The gates of DDP and of its baselines: masks while learning, masks as deployed, and the budget that they meet."""

import pytest
import torch
from helpers.learning import task_of
from helpers.tiny import tiny_model

from learner.job import GATES, DDPSettings
from learner.methods import ddp, gates


@pytest.mark.parametrize("gate", GATES)
def test_each_gate_meets_its_budget(gate):
    task = task_of(tiny_model("llama", 6, 6, 100), DDPSettings(steps=100, batch_size=4, gate=gate), 0.4)
    for kind, m in ddp.learn(task).values.items():
        kept, wanted = int((m > 0).sum()), task.units.kept(kind, 0.4)
        assert abs(kept - wanted) <= 0.01 * task.units.count(kind), f"{kind}: {kept} kept, {wanted} wanted"


def test_masks_that_are_all_1_are_cut_by_their_parameters():
    z = torch.tensor([[0.9, 0.3, 0.7], [0.2, 0.8, 0.5]])
    m = ddp._harden("channel", torch.ones(2, 3), z, wanted=3)
    assert m.tolist() == [[1, 0, 1], [0, 1, 0]]


def test_deployed_hard_concrete_masks_are_the_means_over_the_noise():
    z = torch.linspace(-0.5, 2, 26)[None]
    noise = torch.Generator().manual_seed(0)
    drawn = gates.masks(z.expand(20_000, -1), "hard-concrete", 0.5, noise)
    above_0 = (drawn > 0).float().mean(0)
    torch.testing.assert_close(gates.scores(z, "hard-concrete", 0.5)[0], above_0, atol=0.015, rtol=0)
    m = gates.deployed(z, "hard-concrete", 0.5, groups=1)[0]
    kept = round(above_0.sum().item())
    assert m[:-kept].max() == 0 and m[-kept:].min() > 0, "as many as are above 0 on average, the largest"
    torch.testing.assert_close(m[-kept:], drawn.mean(0)[-kept:], atol=0.02, rtol=0)


def test_each_group_keeps_as_many_hard_concrete_masks_as_it_expects():
    z = torch.tensor([[2.0, 2.0, -2.0, -2.0], [2.0, 1.9, 1.8, -2.0]])
    assert (gates.deployed(z, "hard-concrete", 0.5, groups=2) > 0).sum(1).tolist() == [2, 3]
    assert (gates.deployed(z, "hard-concrete", 0.5, groups=1) > 0).sum().item() == 5
    tied = gates.deployed(torch.zeros(1, 10), "hard-concrete", 0.5, groups=1)
    assert (tied > 0).sum() == 5, "ties too"


def test_deterministic_masks_sharpen_with_their_scores():
    z = torch.tensor([-0.1, 0, 0.02, 0.1, 0.6, 1, 2])
    for mu, ones in ((0.5, 2), (0.05, 4)):
        m = gates.masks(z, "deterministic-hard-concrete", mu)
        assert torch.equal(m, gates.scores(z, "deterministic-hard-concrete", mu))
        assert (m > 1 - 1e-6).sum() == ones
        assert (gates.deployed(z, "deterministic-hard-concrete", mu, groups=1) > 0).tolist() == (z > 0).tolist()
