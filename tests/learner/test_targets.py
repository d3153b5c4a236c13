"""Targets in parameters, bytes and ideal speedup: what units cost, and budgets that are met."""

import argparse
import json

import pytest
import torch
from helpers.learning import geometry_of, run, task_of
from helpers.tiny import tiny_model

from converter.convert import convert
from converter.inspection import inspect
from converter.plan import make_plan
from learner.job import Job
from learner.methods import baselines, ddp, depth, flap, reap, taylor, wanda
from learner.methods.maskprune import learn as maskprune
from learner.methods.stages import Stages
from learner.methods.tyr import learn as tyr
from learner.model.budget import make_budgets
from learner.model.costs import UnitCosts
from learner.model.units import Units
from learner.outcome import left_by
from learner.run.journal import Journal
from learner.settings import CalibrationSettings, DDPSettings, MaskPruneSettings, ReapSettings, TyrSettings
from learner.targets import Target, number_of_bytes, number_of_parameters, speedup
from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.families import FAMILIES
from pruned_vllm.formats.ideal import Case, ideal_cost

AT = "decode:2:16:8"  # so few tokens that weights count more than the KV cache, as in large models
SIZES = {"llama": (8, 8, 256), "qwen3": (8, 4, 256), "qwen3_moe": (8, 4, 256)}


def model_of(name: str):
    config = {"moe_intermediate_size": 96} if name == "qwen3_moe" else {}
    return tiny_model(name, *SIZES[name], **config)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "deepseek"])
def test_costs_of_units_add_up_to_the_cost_of_the_model(name, tied):
    """Against the geometry of what is left, in every measure; no layer loses all."""
    model = tiny_model(name, 8, 4, 40)
    geometry = geometry_of(model)
    units = Units.from_geometry(geometry, tied)
    generator = torch.Generator().manual_seed(1)
    left = {}
    for kind in units.layers:
        left[kind] = (torch.rand(units.shape(kind), generator=generator) < 0.6).double()
        left[kind][:, 0] = 1
    pruned = left_by(geometry, units.to_masks(left), drops_experts=False)
    assert pruned != geometry
    measures = [lambda model: model.num_parameters, lambda model: model.num_parameters * 2]
    cases = [Case.parse(text) for text in ("decode:1:100:20", "decode:64:10:2", "prefill:2:50")]
    measures += [lambda model, case=case: ideal_cost(model, case, 2) for case in cases]
    for measure in measures:
        costs = UnitCosts.measured(units, geometry, measure)
        assert costs.fixed + costs.of_units(left).item() == pytest.approx(measure(pruned), rel=1e-9)
        rows = [costs.of_row(kind, row, kept.bool()) for kind in left for row, kept in enumerate(left[kind])]
        assert sum(rows) == pytest.approx(costs.of_units(left).item(), rel=1e-9)
        added = costs.in_order({kind: torch.rand(values.shape).double() + values for kind, values in left.items()})
        kept_alone = sum((added[kind] * left[kind]).sum().item() for kind in left)
        assert kept_alone == pytest.approx(costs.of_units(left).item(), rel=1e-9)


QUICK = {"batch_size": 2, "sequence_length": 32}
CALIBRATION = {"calibration_sequences": 4, "sequence_length": 32}
SEARCH = {"iterations": 4, "generations": 1, "offspring": 4, "selection_tokens": 64}
BASELINES = {
    "wanda": (wanda.learn, CalibrationSettings(**CALIBRATION)),
    "flap": (flap.learn, CalibrationSettings(**CALIBRATION)),
    "taylor": (taylor.learn, CalibrationSettings(**CALIBRATION)),
    "magnitude": (baselines.magnitude, None),
    "random": (baselines.random, None),
}
METHODS = {
    "ddp": (ddp.learn, DDPSettings(steps=20, **QUICK)),
    "maskprune": (maskprune.learn, MaskPruneSettings(steps=10, lora_rank=0, **QUICK)),
    "tyr": (tyr.learn, TyrSettings(**CALIBRATION, **SEARCH)),
    "tyr, all layers alike": (tyr.learn, TyrSettings(**CALIBRATION, **SEARCH | {"iterations": 0})),
    **BASELINES,
}


def costs_asked(geometry, keep: float = 0.8) -> dict[str, float]:
    """By measure, what this share of a dense model comes to in float32; of the time 1 / 1.25 whatever the share."""
    return {"parameters": keep * geometry.num_parameters, "bytes": 4 * keep * geometry.num_parameters, "speedup": 1.25}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("measure", ["parameters", "bytes", "speedup"])
@pytest.mark.parametrize("method", METHODS)
def test_each_method_meets_a_cost(method, measure, name):
    learn, settings = METHODS[method]
    model = model_of(name)
    geometry = geometry_of(model)
    target = {f"target_{measure}": [costs_asked(geometry)[measure]]}
    task = task_of(model, settings, tied=method == "maskprune", at=AT, **target)
    values = learn(task).values
    left = left_by(geometry, task.units.to_masks(values), drops_experts=False)
    achieved = task.budget.measure(left) / task.budget.allowed
    assert achieved <= 1 + 1e-9
    assert achieved == pytest.approx(1, abs=0.005)
    assert all((values[kind] > 0).sum() > 0 for kind in values)


@pytest.mark.parametrize("target", [1.02, 1.6])
def test_no_head_goes_that_there_is_room_for(target):
    """Where KV heads cost so much that a budget is far from spent when the next does not fit."""
    task = task_of(model_of("qwen3"), target_speedup=[target], at="decode:8:2000:8")
    values, costs, room = baselines.random(task).values, task.budget.costs, task.budget.room
    groups = values["head"].unflatten(1, (-1, costs.heads_per_kv_head))
    gone = ((groups == 0) & groups.any(2, keepdim=True)).flatten(1)
    assert 0 < groups.any(2).float().mean() < 1, "some KV heads go"
    for layer, head in gone.nonzero().tolist():
        more = {kind: of_kind.double() for kind, of_kind in values.items()}
        more["head"][layer, head] = 1
        assert costs.of_units(more) > room, f"head {head} of layer {layer} was removed for nothing"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("keep", [0.9, 0.75, 0.6])
def test_the_same_share_of_every_kind_goes_as_far_as_heads_allow(tied, keep):
    """By a baseline whose budget is a cost: half a head of a layer is as near as whole heads come."""
    model = tiny_model("qwen3", 8, 4, 2048)  # channels cost so much that those that make up for a head do not count
    task = task_of(model, tied=tied, target_parameters=[keep * geometry_of(model).num_parameters])
    values = baselines.magnitude(task).values
    shares = {kind: (of_kind <= 0).double().mean(1) for kind, of_kind in values.items()}
    assert (shares["head"] - shares["channel"]).abs().max() <= 0.5 / task.units.widths["head"] + 0.01


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("measure", ["parameters", "bytes", "speedup"])
def test_depth_meets_a_cost_to_a_layer(measure, name):
    model = model_of(name)
    geometry = geometry_of(model)
    target = {f"target_{measure}": [costs_asked(geometry, 0.75)[measure]], "at": AT}
    task = task_of(model, CalibrationSettings(**CALIBRATION), **target)
    values = depth.learn(task).values
    left = left_by(geometry, task.units.to_masks(values), drops_experts=False)
    counts = {kind: of_kind.sum(1).tolist() for kind, of_kind in values.items()}
    assert all(set(of_kind) == {0, task.units.widths[kind]} for kind, of_kind in counts.items())
    a_layer = (task.budget.measure(geometry) - task.budget.costs.fixed) / len(geometry.layers)
    assert task.budget.allowed - a_layer < task.budget.measure(left) <= task.budget.allowed


def test_depth_refuses_a_cost_that_leaves_less_than_a_layer():
    model = model_of("llama")
    task = task_of(model, CalibrationSettings(**CALIBRATION), target_speedup=[4], at=AT)
    assert task.budget.room > 0, "units of less than a layer could meet it"
    with pytest.raises(InputError, match="cannot be reached by removing layers"):
        depth.learn(task)


def test_reap_meets_a_cost_to_an_expert():
    model = tiny_model("qwen3_moe", 8, 4, 40, num_experts=8)
    geometry = geometry_of(model)
    target = {"target_parameters": [0.9 * geometry.num_parameters]}
    task = task_of(model, ReapSettings(**CALIBRATION, budget="global"), **target)
    kept = reap.learn(task).values["expert"]
    left = left_by(geometry, task.units.to_masks({**{"head": torch.ones(3, 8)}, "expert": kept}), drops_experts=True)
    one_expert = geometry.layer_parameters(0) / 8
    assert task.budget.allowed - one_expert < left.num_parameters <= task.budget.allowed
    assert min(len(layer.expert_intermediate_sizes) for layer in left.layers) >= 2
    with pytest.raises(InputError, match="--budget layer removes the same share of every layer; say --budget global"):
        Job("", "reap", data=["text.txt"], settings=ReapSettings(**CALIBRATION), **target)
    with pytest.raises(InputError, match="cannot be reached by removing experts"):
        reap.learn(
            task_of(
                model,
                ReapSettings(**CALIBRATION, budget="global"),
                target_parameters=[0.55 * geometry.num_parameters],
            )
        )


@pytest.mark.parametrize("gate", ["relu", "deterministic-hard-concrete"])
@pytest.mark.parametrize("steps", [12, 50])
@pytest.mark.parametrize("target", [{"sparsity": 0.4}, {"target_speedup": [1.2], "at": AT}])
def test_learning_meets_the_budget_before_units_are_fixed(steps, target, gate):
    journal = Journal()
    task = task_of(model_of("qwen3"), DDPSettings(steps=steps, gate=gate, **QUICK), journal=journal, **target)
    ddp.learn(task)
    moments = [Stages(steps, [0.5], task.settings.settle).at(step) for step in range(steps)]
    before = max(step for step, moment in enumerate(moments) if moment.share and moment.fading)
    assert before < steps - 2
    assert abs(journal._rows[before]["over"]) <= 0.005
    assert journal._rows[0]["over"] > 0, "at the first step nothing is removed yet"


def test_stages_share_the_steps_and_end_fixed():
    stages = Stages(100, [0.8, 0.7, 0.5], 0.4)
    moments = [stages.at(step) for step in range(100)]
    assert [sum(moment.stage == index for moment in moments) for index in range(3)] == [40, 20, 40]
    assert [step for step, moment in enumerate(moments) if moment.is_first] == [0, 40, 60]
    assert [step for step, moment in enumerate(moments) if moment.is_last] == [39, 59, 99]
    last = [moment for moment in moments if moment.stage == 2]
    assert [moment.share for moment in last] == [None] * 24 + [pytest.approx(i / 6) for i in range(1, 7)] + [1] * 2 + [
        None
    ] * 8
    faded = [moment.fading for moment in last if moment.share]
    assert faded[-1] == 0 and 0 < faded[0] < 0.2 and len(set(faded[:-1])) == 1
    assert [moment.is_settled for moment in last] == [False] * 32 + [True] * 8
    assert last[16].progress == 0.5 and last[32].progress == 1
    paper = [Stages(1000, [0.5], 0).at(step) for step in range(1000)]
    assert all(moment.share is None and not moment.is_settled for moment in paper) and paper[250].progress == 0.25
    assert [Stages(3, [1.0, 0.5], 0).at(step).stage for step in range(3)] == [0, 1, 1], "none is left out"
    assert Stages(3, [1.0], 0.3).at(2).is_last


SMALL = {
    "random": ["--method", "random"],
    "ddp": ["--steps", 40, "--batch-size", 2, "--sequence-length", 32],
}


@pytest.mark.parametrize("method", ["random", "ddp"])
def test_the_predicted_speedup_is_what_inspect_says(word_model, capsys, method):
    """inspect counts a context of 1,024 tokens, which is the mean of this case."""
    case = ["--at", "decode:8:1023:2", "--target-speedup", 1.1]
    ckpt, out = word_model / "ckpt", word_model / "out"
    assert run(word_model / "model", ckpt, "--data", word_model / "text.txt", *SMALL[method], *case) == 0
    assert "at decode:8:1023:2" in capsys.readouterr().out
    told = json.loads((ckpt / "pruning.json").read_text())["budget"]
    assert told["target"] == {"speedup": 1.1} and told["achieved"] == {"speedup": told["ideal_speedup"]}
    assert told["ideal_speedup"] == pytest.approx(inspect(ckpt).ideal_speedup(8)["bytes"])
    convert(make_plan(ckpt, alignment=64), out)
    assert told["padded_ideal_speedup"] == pytest.approx(inspect(out).ideal_speedup(8)["bytes"])
    results = json.loads((ckpt / "learning.json").read_text())["results"]
    assert results["ideal_speedup"] == told["ideal_speedup"] and results["bytes"] == inspect(ckpt).total_bytes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsity", 0.5, "--target-bytes", "1MB"], "--sparsity and --target-bytes are different budgets"),
        (["--target-bytes", "1MB", "--target-speedup", 1.5], "are different budgets"),
        (["--target-bytes", "1MB", "--head-sparsity", 0.5], "leave out --head-sparsity"),
        (["--target-bytes", "1GB"], "is no less than the dense model has"),
        (["--target-bytes", "1KB"], "cannot be reached"),
        (["--target-speedup", 500], "without any of them the model has speedup"),
        (["--target-speedup", 1.5, "--at", "decode:8"], "--at: 'decode:8' is neither"),
        (["--sparsity", 0.5, 0.5], "give each value once"),
        (["--method", "tyr", "--sparsity", 0.2, 0.5], "tyr learns weights for one budget"),
        (["--method", "maskprune", "--sparsity", 0.2, 0.5], "maskprune learns weights for one budget"),
        (["--budget", "layer", "--target-bytes", "1MB"], "--budget layer removes the same share of every layer"),
        (["--steps", 1, "--sparsity", 0.2, 0.5], "--steps 1 are too few for 2 budgets"),
        (["--settle", 1.5], "it must be at most 1"),
        (["--report", "--method", "random", "--sparsity", 0.2, 0.5], "--report draws what one budget leaves"),
    ],
)
def test_targets_that_cannot_be_are_refused(word_model, capsys, arguments, message):
    small = [] if "--method" in arguments else SMALL["ddp"]
    assert run(word_model / "model", word_model / "ckpt", "--data", word_model / "text.txt", *small, *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (word_model / "ckpt").exists() and not (word_model / "ckpt.unfinished").exists()


@pytest.mark.parametrize(
    ("read", "text", "value"),
    [
        (number_of_parameters, "5B", 5e9),
        (number_of_parameters, "1.5M", 1.5e6),
        (number_of_parameters, "123456", 123456),
        (number_of_bytes, "9GB", 9e9),
        (number_of_bytes, "2GiB", 2 << 30),
        (number_of_bytes, "12B", 12),
        (speedup, "1.5", 1.5),
        (number_of_parameters, "5GB", None),
        (number_of_bytes, "-1GB", None),
        (number_of_bytes, "nanGB", None),
        (speedup, "1", None),
        (speedup, "2x", None),
    ],
)
def test_numbers_of_targets(read, text, value):
    if value is not None:
        assert read(text) == value
        return
    with pytest.raises(argparse.ArgumentTypeError):
        read(text)


def test_names_of_targets():
    targets = [("sparsity", 0.2), ("sparsity", 0.125), ("parameters", 5e9), ("parameters", 123456), ("bytes", 1.5e9)]
    names = [Target(measure, value).name for measure, value in [*targets, ("bytes", 2 << 30), ("speedup", 1.5)]]
    assert names == ["20", "12.5", "5B", "123456", "1.5GB", "2147483648B", "1.5x"]
    assert [Target("bytes", value).name for value in (1e40, 1e-5)] == ["1e+40", "1e-05"]  # to be refused by that name


def test_units_that_stay_whatever_the_target_count_as_fixed():
    geometry = geometry_of(model_of("qwen3"))
    units = Units.from_geometry(geometry).without("head")
    job = Job("", "random", target_parameters=[0.9 * geometry.num_parameters], head_sparsity=0)
    (budget,) = make_budgets(job, units, geometry, 2)
    assert set(budget.support({"channel": torch.rand(units.shape("channel"))})) == {"channel"}
    with pytest.raises(InputError, match="cannot be reached: what random may prune are the channel units"):
        make_budgets(Job("", "random", target_parameters=[budget.costs.fixed]), units, geometry, 2)
