"""bench.budgets and bench.targets: what they record of short runs on a tiny model."""

import json

import pytest

from bench import budgets, pico, targets
from bench.sweep.shapes import grid_shapes
from bench.targets import write_random_model
from learner.job import Job
from learner.model.dense import check_dense


@pytest.fixture
def tiny_pico(word_model, monkeypatch):
    """A tiny model in place of the pico ones, with runs of few steps."""
    model, text = word_model / "model", (word_model / "text.txt").read_text()
    for name in ("train.txt", "heldout.txt"):
        (model / name).write_text(text)
    (model / "pico.json").write_text("{}")
    monkeypatch.setattr(pico, "pico_model", lambda name: model)
    monkeypatch.setattr(budgets, "BATCH", {"batch_size": 2, "sequence_length": 32})
    monkeypatch.setattr(budgets, "DDP_STEPS", (12,))
    monkeypatch.setattr(budgets, "JOINT_STEPS", 12)
    monkeypatch.setattr(budgets, "SEEDS", (1, 2))
    return word_model


def recorded(directory, what: str) -> list[dict]:
    assert budgets.main([what, "llama", "--output-dir", str(directory / "out")]) == 0
    return json.loads((directory / "out" / f"{what}_llama.json").read_text())["runs"]


def test_budgets_record_what_was_met_and_what_was_cut(tiny_pico):
    runs = recorded(tiny_pico, "met")
    assert [(run["measure"], run["settle"]) for run in runs] == [
        ("sparsity", 0.3), ("sparsity", 0), ("bytes", 0.3), ("speedup", 0.3)
    ]  # fmt: skip
    assert all(abs(run["of_budget"] - 1) <= 0.005 for run in runs)
    settled, paper = runs[:2]
    assert abs(settled["over_before_fixing"]) <= 0.005 < settled["over_before_fading"]
    assert paper["over_before_fixing"] == paper["over_before_fading"] > 0.1, "12 steps move no mask to zero"


def test_joint_budgets_have_the_bytes_of_separate_ones(tiny_pico):
    runs = recorded(tiny_pico, "joint")
    assert [(run["sparsity"], run["seed"]) for run in runs] == [(0.2, 1), (0.2, 2), (0.5, 1), (0.5, 2)]
    assert all(0.995 <= run["joint"]["bytes"] / run["separate"]["bytes"] <= 1 for run in runs)


def test_joint_budgets_of_a_real_model_are_compared_by_scores(tiny_pico, monkeypatch):
    monkeypatch.setattr(budgets, "CALIBRATION", {"calibration_sequences": 2, "sequence_length": 32})
    text, out = str(tiny_pico / "text.txt"), tiny_pico / "out"
    methods = ["--methods", "flap", "taylor", "--data", text, "--eval-data", text]
    assert budgets.main(["joint", str(tiny_pico / "model"), *methods, "--output-dir", str(out)]) == 0
    found = json.loads((out / "joint_model.json").read_text())
    assert found["model"]["name"] == "model" and found["model"]["fingerprint"]
    assert [(run["joint"]["method"], run["sparsity"], run["seed"]) for run in found["runs"]] == [
        (method, sparsity, seed) for method in ("flap", "taylor") for sparsity in (0.2, 0.5) for seed in (1, 2)
    ]
    assert all(0.995 <= run["joint"]["bytes"] / run["separate"]["bytes"] <= 1 for run in found["runs"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["met", "elsewhere"], "choose joint, --data and --eval-data"),
        (["joint", "elsewhere"], "choose joint, --data and --eval-data"),
        (["joint", "llama", "--data", "text.txt"], "llama has texts of its own"),
        (["met", "llama", "--methods", "flap"], "--methods and --sparsity are for joint"),
        (["met", "llama", "--sparsity", "0.5"], "--methods and --sparsity are for joint"),
    ],
)
def test_what_would_change_nothing_is_refused(tmp_path, capsys, wrong, message):
    with pytest.raises(SystemExit):
        budgets.main([*wrong, "--output-dir", str(tmp_path / "out")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shape", grid_shapes(256, 1))
def test_models_of_targets_can_be_learned_on(tmp_path, shape):
    write_random_model(grid_shapes(256, 1)[shape], tmp_path, "bfloat16")
    checked = check_dense(Job(str(tmp_path), "magnitude"), "whole")
    assert str(checked.dtype) == "torch.bfloat16" and "head" in checked.units.layers


def test_shapes_that_were_measured_before_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(targets, "measure_shape", lambda config, directory, args: {"speedup": args.speedup})
    monkeypatch.setattr(targets, "show", lambda shapes: None)
    for shape, speedup in (("MoE", "1.2"), ("MHA", "1.3"), ("MoE", "1.4")):
        assert targets.main(["--output-dir", str(tmp_path), "--shapes", shape, "--speedup", speedup]) == 0
    found = json.loads((tmp_path / "targets.json").read_text())["shapes"]
    assert {name: shape["speedup"] for name, shape in found.items()} == {"MHA": "1.3", "MoE": "1.4"}
    assert "--shapes MoE --speedup 1.4" in found["MoE"]["command"]
