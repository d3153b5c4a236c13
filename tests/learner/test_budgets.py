"""What has to meet the sparsity by itself: the model, each layer, each expert; and heads apart from channels."""

import json

import pytest
import torch
from helpers.learning import task_of, unit_budget
from helpers.tiny import tiny_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from learner import cli
from learner.methods.ddp import learn as learn_ddp
from learner.methods.ddp import penalty
from learner.model.units import Units
from learner.settings import DDPSettings


def test_groups_are_the_model_the_layers_or_the_experts():
    units = task_of(tiny_model("qwen2_moe", 6, 3, 40, mlp_only_layers=[1])).units
    groups = {
        budget: {kind: units.num_groups(kind, budget) for kind in units.layers}
        for budget in ("global", "layer", "expert")
    }
    assert groups == {
        "global": {"head": 1, "channel": 1, "expert": 1},
        "layer": {"head": 3, "channel": 1, "expert": 2},
        "expert": {"head": 3, "channel": 1, "expert": 8},
    }
    assert [units.kept("expert", 0.25, budget) for budget in groups] == [144, 72, 18]
    assert units.kept("head", 0.9, "layer") == 1


def test_penalty_of_groups_is_the_mean_of_theirs():
    s, multipliers = torch.rand(3, 8), torch.randn(3, 3)
    left, undecided = s.mean(1), (s * (1 - s)).mean(1)
    alone = [penalty(left[i : i + 1], undecided[i : i + 1], 0.5, multipliers[:, i : i + 1]) for i in range(3)]
    torch.testing.assert_close(penalty(left, undecided, 0.5, multipliers), sum(alone) / 3)


def test_one_group_moves_exactly_as_without_groups():
    """Against equations (13) and (15) for a whole kind, bit by bit."""
    s = torch.rand(4, 6144, generator=torch.Generator().manual_seed(0)).requires_grad_()
    multipliers = torch.randn(3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    violation = s.mean() - 0.7
    expected = torch.autograd.grad(
        multipliers @ torch.stack([violation, violation**2, (s * (1 - s)).mean()]), (s, multipliers)
    )
    units = Units({"channel": tuple(range(4))}, {"channel": 6144}, 1, 0)
    constraint = unit_budget(units, 0.3).constraints()["channel"]
    left, undecided = constraint.left({"channel": s}), constraint.undecided({"channel": s})
    gradients = torch.autograd.grad(penalty(left, undecided, 0.7, multipliers[:, None]), (s, multipliers))
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert torch.equal(gradient, wanted)


def test_each_group_keeps_its_largest():
    units = Units({"expert": (0, 1)}, {"expert": 8}, 1, 2)
    order = torch.tensor([[0.1, 0.2, 0.3, 0.4, 1, 0, 0, -1], [1, 2, 4, 3, 1, 0, 2, 0]])
    budget = unit_budget(units, 0.5)
    kept = budget.support({"expert": order}, "expert")["expert"].view(4, 4)
    assert kept.int().tolist() == [[0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0]]
    assert budget.support({"expert": order})["expert"].sum(1).tolist() == [2, 6], "a layer may lose most"


@pytest.mark.parametrize("budget", ["layer", "expert"])
def test_each_group_meets_its_budget(budget):
    model = tiny_model("qwen3_moe", 6, 3, 40, moe_intermediate_size=52, mlp_only_layers=[1])
    target = {"head": 0.34, "channel": 0.4, "expert": 0.4}
    settings = DDPSettings(steps=150, batch_size=4, lambda2_learning_rate=1.6, budget=budget)
    task = task_of(model, settings, target)
    values, units = learn_ddp(task).values, task.units
    for kind, m in values.items():
        groups = m.view(units.num_groups(kind, budget), -1)
        kept, wanted = (groups > 0).sum(1), units.kept(kind, target[kind], budget)
        assert (kept - wanted).abs().max() <= max(1, 0.03 * groups.shape[1]), f"{kind}: {kept.tolist()}, not {wanted}"
    assert values["expert"].unique().numel() > 30, "masks are values, not zeros and ones"


@pytest.fixture
def saved(tmp_path):
    """Saves a tiny model with a tokenizer that knows digits, and a text."""

    def save(model_type: str):
        tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(256)}, unk_token="0"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tiny_model(model_type, 6, 3, 40).save_pretrained(tmp_path / "model")
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "model")
        (tmp_path / "text.txt").write_text(" ".join(str(i * i % 256) for i in range(3000)))
        return tmp_path

    return save


def learn(directory, method: str, *arguments) -> int:
    small = ["--method", method, "--data", directory / "text.txt"]
    if method == "ddp":
        small += ["--steps", 40, "--batch-size", 2, "--sequence-length", 32, "--budget", "expert"]
    return cli.main([str(argument) for argument in (directory / "model", directory / "ckpt", *small, *arguments)])


@pytest.mark.parametrize("method", ["ddp", "magnitude", "random"])
def test_heads_stay_where_their_sparsity_is_0(saved, method):
    directory = saved("qwen3_moe")
    assert learn(directory, method, "--head-sparsity", 0) == 0
    masks = load_file(directory / "ckpt" / "pruning_masks.safetensors")
    assert set(masks) == {f"model.layers.{layer}.mlp.experts.channel_mask" for layer in range(3)}
    learning = json.loads((directory / "ckpt" / "learning.json").read_text())
    assert "head_sparsity" not in learning["results"] and learning["job"]["head_sparsity"] == 0
    assert learning["results"]["expert_sparsity"] == pytest.approx(0.5, abs=0.05)


def test_heads_may_have_a_sparsity_of_their_own(saved):
    directory = saved("qwen3")
    assert learn(directory, "magnitude", "--head-sparsity", 0.3, "--sparsity", 0.8) == 0
    results = json.loads((directory / "ckpt" / "learning.json").read_text())["results"]
    assert results["head_sparsity"] == pytest.approx(1 / 3) and results["channel_sparsity"] == pytest.approx(0.8)


def test_a_model_that_cannot_lose_heads_takes_no_sparsity_for_them(saved, capsys):
    directory = saved("olmoe")
    assert learn(directory, "random", "--head-sparsity", 0.3) == 2
    assert "OlmoeForCausalLM cannot lose heads; leave out --head-sparsity" in capsys.readouterr().err
