"""Several budgets from one run: nested, each met, and resumed."""

import itertools
import json

import pytest
import torch
from helpers.learning import geometry_of, run, task_of
from safetensors.torch import load_file

from converter.convert import convert
from converter.plan import make_plan
from learner.methods import depth
from learner.outcome import left_by
from learner.run import training
from learner.settings import CalibrationSettings
from tests.learner.test_targets import BASELINES, CALIBRATION, SMALL, model_of

SHARES = {"sparsity": [0.7, 0.1, 0.3], "target_bytes": [0.75, 0.95, 0.5]}  # of all bytes; depth removes whole layers


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("measure", SHARES)
@pytest.mark.parametrize("method", [*BASELINES, "depth"])
def test_several_budgets_of_a_baseline_are_nested_and_met(method, measure, name):
    learn, settings = (BASELINES | {"depth": (depth.learn, CalibrationSettings(**CALIBRATION))})[method]
    model = model_of(name)
    geometry = geometry_of(model)
    total = 1 if measure == "sparsity" else 4 * geometry.num_parameters
    task = task_of(model, settings, **{measure: [total * share for share in SHARES[measure]]})
    learned = learn(task)
    found = [*learned.shallower, learned.values]
    kept = [torch.cat([values.flatten() for values in of_budget.values()]) for of_budget in found]
    assert len(kept) == 3 and kept[0].sum() > kept[2].sum()
    for more, less in itertools.pairwise(kept):
        assert (more >= less).all() and (more.sum() > less.sum() or method == "depth")
    for budget, of_budget in zip(task.budgets, found, strict=True):
        if measure == "sparsity":
            alone = learn(task_of(model, settings, [budget.target.value])).values
            assert all(torch.equal(alone[kind], of_budget[kind]) for kind in alone)
        elif method != "depth":
            left = left_by(geometry, task.units.to_masks(of_budget), drops_experts=False)
            assert 0.995 <= budget.measure(left) / budget.allowed <= 1


SEVERAL = {"sparsity": (["--sparsity", 0.5, 0.2], ("20", "50")), "bytes": (["--target-bytes", "1MB", "900KB"], None)}


@pytest.mark.parametrize("method", SMALL)
@pytest.mark.parametrize("targets", SEVERAL)
def test_several_budgets_are_nested(word_model, method, targets):
    arguments, names = SEVERAL[targets]
    ckpt = word_model / "ckpt"
    assert run(word_model / "model", ckpt, "--data", word_model / "text.txt", *SMALL[method], *arguments) == 0
    names = names or ("1MB", "900KB")
    assert sorted(path.name for path in ckpt.iterdir() if path.is_dir()) == sorted(names)
    larger, smaller = (load_file(ckpt / name / "pruning_masks.safetensors") for name in names)
    assert all(((larger[key] != 0) | (smaller[key] == 0)).all() for key in larger), "what is gone stays gone"
    sizes = []
    for name in names:
        plan = make_plan(ckpt / name)
        convert(plan, word_model / name)
        told = json.loads((ckpt / name / "pruning.json").read_text())["budget"]
        assert told["parameters"] == plan.pruned.num_parameters
        sizes.append(told["bytes"])
    assert sizes[0] > sizes[1]
    if targets == "bytes":
        assert sizes == [pytest.approx(1e6, rel=0.005), pytest.approx(9e5, rel=0.005)]


@pytest.mark.parametrize("step", [13, 27])
def test_a_run_with_several_budgets_is_resumed(word_model, monkeypatch, step):
    arguments = ["--data", word_model / "text.txt", *SMALL["ddp"], "--sparsity", 0.2, 0.5]
    assert run(word_model / "model", word_model / "whole", *arguments) == 0
    backward = training.Training.backward

    def interrupted(self, *args, **options):
        if self._step == step:
            raise KeyboardInterrupt
        return backward(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(training, "SAVE_EVERY", 10)
        patch.setattr(training.Training, "backward", interrupted)
        assert run(word_model / "model", word_model / "ckpt", *arguments) == 130
    assert run(word_model / "model", word_model / "ckpt", *arguments, "--resume") == 0
    for name in ("20", "50"):
        whole, resumed = (load_file(word_model / run / name / "pruning_masks.safetensors") for run in ("whole", "ckpt"))
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)
