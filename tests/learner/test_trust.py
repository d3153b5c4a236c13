"""Masks belong to one set of weights, and a run to one model and one text: what has changed since is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.learning import run
from helpers.masked import convert_pruned, edit_json
from helpers.tiny import byte_tokenizer, converted, masks_for, tiny_model
from safetensors.torch import load_file, save_file

from learner.finetune import cli as finetune_cli
from learner.finetune.distillation import Distillation
from learner.run import training

OLD, NEW = "1" * 40, "2" * 40
SHORT = ["--steps", 20, "--batch-size", 2, "--sequence-length", 32]


def train_further(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] += 0.01
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def to_half(model: Path) -> None:
    tensors = {name: tensor.half() for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


CHANGES = {
    "weights": (train_further, "the tensors hold other values"),
    "dtype": (to_half, "the tensors have other names, shapes or dtypes"),
    "config": (lambda model: edit_json(model / "config.json", rms_norm_eps=1e-3), "config.json says something else"),
}


@pytest.fixture
def masks(word_model):
    """A masked checkpoint without weights, beside the model."""
    assert run(word_model / "model", word_model / "ckpt", "--method", "magnitude") == 0
    return word_model / "ckpt"


@pytest.mark.parametrize("name", CHANGES)
def test_masks_of_another_model_are_refused(masks, word_model, capsys, name):
    change, message = CHANGES[name]
    shutil.copytree(word_model / "model", word_model / "copy")
    change(word_model / "model")
    assert convert_pruned(masks, word_model / "out") == 2
    error = capsys.readouterr().err
    assert message in error and "--base-model" in error and not (word_model / "out").exists()
    assert convert_pruned(masks, word_model / "out", "--base-model", word_model / "model") == 2
    assert convert_pruned(masks, word_model / "copied", "--base-model", word_model / "copy") == 0
    info = json.loads((masks / "pruning.json").read_text())
    del info["base_fingerprint"]  # as the message says, and as in files of earlier versions
    (masks / "pruning.json").write_text(json.dumps(info))
    assert convert_pruned(masks, word_model / "out") == 0


def test_a_model_that_is_sharded_anew_is_the_same(masks, word_model):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(word_model / "model")
    config = (word_model / "model" / "config.json").read_text()
    (word_model / "model" / "model.safetensors").unlink()
    model.save_pretrained(word_model / "model", max_shard_size="100KB")
    (word_model / "model" / "config.json").write_text(config)
    assert len(list((word_model / "model").glob("*.safetensors"))) > 1
    assert convert_pruned(masks, word_model / "out") == 0


def test_weights_beside_the_masks_have_a_fingerprint_too(word_model, capsys):
    ckpt, tyr = word_model / "ckpt", ["--calibration-sequences", 4, "--sequence-length", 32, "--iterations", 0]
    assert run(word_model / "model", ckpt, "--method", "tyr", "--data", word_model / "text.txt", *tyr) == 0
    assert json.loads((ckpt / "pruning.json").read_text())["base_model"] is None
    assert convert_pruned(ckpt, word_model / "out") == 0
    shutil.copy(word_model / "model" / "model.safetensors", ckpt)
    assert convert_pruned(ckpt, word_model / "other") == 2
    assert "the tensors hold other values" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["", "abc", 3, ["config"]])
def test_what_is_no_fingerprint_is_refused(masks, word_model, capsys, value):
    edit_json(masks / "pruning.json", base_fingerprint=value)
    assert convert_pruned(masks, word_model / "out") == 2
    assert "it must be what learn-masks wrote" in capsys.readouterr().err


@pytest.fixture
def hub(word_model, monkeypatch):
    """The model as owner/model of the hub, whose main branch has moved on since `OLD`; the cache has both commits."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(word_model / "hub"))
    repository = word_model / "hub" / "models--owner--model"
    shutil.copytree(word_model / "model", repository / "snapshots" / OLD)
    train_further(word_model / "model")
    shutil.copytree(word_model / "model", repository / "snapshots" / NEW)
    (repository / "refs").mkdir()
    main = repository / "refs" / "main"
    main.write_text(OLD)
    return main


def test_the_commit_that_masks_were_learned_on_is_converted(word_model, hub, capsys):
    ckpt = word_model / "ckpt"
    assert run("owner/model", ckpt, "--method", "magnitude") == 0
    info = json.loads((ckpt / "pruning.json").read_text())
    assert (info["base_model"], info["base_revision"]) == ("owner/model", OLD)
    assert json.loads((ckpt / "learning.json").read_text())["job"]["revision"] == OLD
    hub.write_text(NEW)
    assert convert_pruned(ckpt, word_model / "out") == 0
    old = load_file(hub.parents[1] / "snapshots" / OLD / "model.safetensors")["model.embed_tokens.weight"]
    (shard,) = (word_model / "out").glob("*.safetensors")
    assert torch.equal(load_file(shard)["model.embed_tokens.weight"], old)
    for arguments in (["--base-model", "owner/model"], ["--revision", NEW]):
        assert convert_pruned(ckpt, word_model / "other", *arguments) == 2
        assert "the tensors hold other values" in capsys.readouterr().err
    assert convert_pruned(ckpt, word_model / "other", "--base-model", "owner/model", "--revision", OLD) == 0


def test_masks_are_learned_on_the_revision_that_is_asked_for(word_model, hub, capsys):
    assert run("owner/model", word_model / "ckpt", "--method", "magnitude", "--revision", NEW) == 0
    assert json.loads((word_model / "ckpt" / "pruning.json").read_text())["base_revision"] == NEW
    assert run("owner/model", word_model / "none", "--method", "magnitude", "--revision", "3" * 40) == 2
    assert f"'owner/model' at revision '{'3' * 40}' is neither a directory" in capsys.readouterr().err
    assert run(word_model / "model", word_model / "none", "--method", "magnitude", "--revision", OLD) == 2
    assert "--revision" in capsys.readouterr().err and not (word_model / "none").exists()


@pytest.fixture
def interrupted(monkeypatch):
    """Ends learn-masks in its step 15, after a save at 10; undone when called."""
    backward = training.Training.backward

    def stop(self, *args, **options):
        if self._step == 15:
            raise KeyboardInterrupt
        return backward(self, *args, **options)

    monkeypatch.setattr(training, "SAVE_EVERY", 10)
    monkeypatch.setattr(training.Training, "backward", stop)
    return lambda: monkeypatch.setattr(training.Training, "backward", backward)


def other_text(text: Path) -> None:
    text.write_text(text.read_text().replace("1", "2"))


INPUTS = {name: ("model", change, f"model: {message}") for name, (change, message) in CHANGES.items()}
INPUTS["text"] = ("text.txt", other_text, "text of --data, or the tokenizer: changed")
INPUTS["tokenizer"] = (
    "model",
    lambda model: (model / "tokenizer.json").write_text(
        (model / "tokenizer.json").read_text().replace('"3": 3', '"3": 4').replace('"4": 4', '"4": 3')
    ),
    "text of --data, or the tokenizer: changed",
)


@pytest.mark.parametrize("name", INPUTS)
def test_a_run_is_not_resumed_on_something_else(word_model, interrupted, capsys, name):
    place, change, message = INPUTS[name]
    arguments = [word_model / "model", word_model / "ckpt", "--data", word_model / "text.txt", *SHORT]
    assert run(*arguments) == 130
    interrupted()
    for path in ("model", "text.txt"):
        (shutil.copytree if path == "model" else shutil.copy)(word_model / path, word_model / f"kept-{path}")
    change(word_model / place)
    assert run(*arguments, "--resume") == 2
    error = capsys.readouterr().err
    assert message in error and "has changed since it began" in error and not (word_model / "ckpt").exists()
    shutil.rmtree(word_model / "model")
    shutil.move(word_model / "kept-model", word_model / "model")
    shutil.move(word_model / "kept-text.txt", word_model / "text.txt")
    assert run(*arguments, "--resume") == 0


def test_a_run_on_a_moved_branch_says_which_commit_it_began_with(word_model, hub, interrupted, capsys):
    arguments = ["owner/model", word_model / "ckpt", "--data", word_model / "text.txt", *SHORT]
    assert run(*arguments) == 130
    interrupted()
    hub.write_text(NEW)
    assert run(*arguments, "--resume") == 2
    error = capsys.readouterr().err
    assert f"revision: {OLD}, now {NEW}" in error and f"goes on with --revision {OLD}" in error
    assert run(*arguments, "--resume", "--revision", OLD) == 0


FINETUNE_INPUTS = {
    "model": ("out", lambda out: train_further(out), "model: the tensors hold other values"),
    "teacher": ("ckpt", lambda ckpt: train_further(ckpt), "teacher: the tensors hold other values"),
    "text": ("text.txt", other_text, "text of --data, or the tokenizer: changed"),
}


@pytest.mark.parametrize("name", FINETUNE_INPUTS)
def test_fine_tuning_is_not_resumed_on_something_else(tmp_path, monkeypatch, capsys, name):
    place, change, message = FINETUNE_INPUTS[name]
    out = converted(tmp_path, tiny_model("llama", 6, 6, 40), masks_for([[1, 1, 1, 0, 0, 0]] * 3, []))
    (shard,) = out.glob("*.safetensors")
    shard.rename(out / "model.safetensors")
    (out / "model.safetensors.index.json").unlink(missing_ok=True)
    for directory in (out, tmp_path / "ckpt"):
        byte_tokenizer().save_pretrained(directory)
    (tmp_path / "text.txt").write_text("It was the 1st of times, it was the 2nd of times. " * 40)
    arguments = [out, tmp_path / "recovered", "--data", tmp_path / "text.txt", "--teacher", tmp_path / "ckpt"]
    arguments += ["--steps", 3, "--batch-size", 2, "--sequence-length", 32, "--device", "cpu"]
    arguments = [str(argument) for argument in arguments]
    monkeypatch.setattr("learner.finetune.finetune.SAVE_EVERY", 1)
    compute_loss = Distillation.compute_loss

    def stop(self, *args, **kwargs):
        if self.state.global_step == 2:
            raise KeyboardInterrupt
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(Distillation, "compute_loss", stop)
    assert finetune_cli.main(arguments) == 130
    monkeypatch.setattr(Distillation, "compute_loss", compute_loss)
    change(tmp_path / place)
    assert finetune_cli.main([*arguments, "--resume"]) == 2
    assert message in capsys.readouterr().err
