"""The gates of DDP and of its baselines: masks while learning, masks as deployed, and the budget that they meet."""

import pytest
import torch
from helpers.learning import task_of
from helpers.tiny import tiny_model

from learner.methods import ddp, gates
from learner.settings import GATES, DDPSettings


@pytest.mark.parametrize("gate", GATES)
def test_each_gate_meets_its_budget(gate):
    task = task_of(tiny_model("llama", 6, 6, 100), DDPSettings(steps=100, batch_size=4, gate=gate), 0.4)
    for kind, m in ddp.learn(task).values.items():
        kept, wanted = int((m > 0).sum()), task.units.kept(kind, 0.4)
        assert abs(kept - wanted) <= 0.01 * task.units.count(kind), f"{kind}: {kept} kept, {wanted} wanted"


def test_deployed_hard_concrete_masks_are_the_means_over_the_noise():
    z = torch.linspace(-0.5, 2, 26)[None]
    noise = torch.Generator().manual_seed(0)
    drawn = gates.masks(z.expand(20_000, -1), "hard-concrete", 0.5, noise)
    above_0 = (drawn > 0).float().mean(0)
    torch.testing.assert_close(gates.scores(z, "hard-concrete", 0.5)[0], above_0, atol=0.015, rtol=0)
    stays = torch.ones_like(z, dtype=torch.bool)
    stays[0, ::5] = False
    m = gates.deployed(z, "hard-concrete", 0.5, stays)
    assert m[~stays].max() == 0 and m[stays].min() > 0
    torch.testing.assert_close(m[stays], drawn.mean(0, keepdim=True)[stays], atol=0.02, rtol=0)


def test_deterministic_masks_sharpen_with_their_scores():
    z = torch.tensor([-0.1, 0, 0.02, 0.1, 0.6, 1, 2])
    for mu, ones in ((0.5, 2), (0.05, 4)):
        m = gates.masks(z, "deterministic-hard-concrete", mu)
        assert torch.equal(m, gates.scores(z, "deterministic-hard-concrete", mu))
        assert (m > 1 - 1e-6).sum() == ones
        deployed = gates.deployed(z, "deterministic-hard-concrete", mu, torch.ones_like(z, dtype=torch.bool))
        assert (deployed > 0).tolist() == (z > 0).tolist()
