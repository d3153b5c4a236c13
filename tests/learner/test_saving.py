"""Models whose weights were trained keep what lies beside them, byte for byte, even where it is invalid."""

import json
from pathlib import Path

import pytest
from helpers.tiny import byte_tokenizer, converted, masks_for, tiny_model

from learner import cli as learn_cli
from learner.finetune import cli as finetune_cli

TYR = ["--calibration-sequences", 8, "--iterations", 2, "--generations", 1, "--offspring", 2, "--selection-tokens", 64]
SMALL = ["--steps", 2, "--batch-size", 2]
COMMANDS = {
    "finetune-pruned, LoRA": (finetune_cli.main, SMALL),
    "finetune-pruned, all weights": (finetune_cli.main, [*SMALL, "--lora-rank", 0]),
    "learn-masks": (learn_cli.main, ["--method", "tyr", *TYR]),
}


def fill(directory: Path) -> dict[str, bytes]:
    """An invalid generation_config.json, as of Vicuna, a tokenizer written by hand, and modules; returns the files."""
    byte_tokenizer().save_pretrained(directory)
    tokenizer = json.loads((directory / "tokenizer_config.json").read_text()) | {"chat_template": "{{ messages }}"}
    (directory / "1_Pooling").mkdir()
    files = {
        "tokenizer_config.json": json.dumps(tokenizer, indent=1) + "\n\n",
        "generation_config.json": '{"temperature": 0.9, "top_p": 0.6}',
        "modules.json": json.dumps([{"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]),
        "1_Pooling/config.json": '{"pooling_mode_mean_tokens": true}',
        "LICENSE": "as is",
    }
    for name, text in files.items():
        (directory / name).write_text(text)
    return {name: (directory / name).read_bytes() for name in (*files, "tokenizer.json")}


@pytest.fixture(params=COMMANDS)
def command(request, tmp_path, monkeypatch):
    """A directory with a model that the command takes, and the command, which writes `trained` beside it."""
    main, options = COMMANDS[request.param]
    model = tiny_model("llama", 6, 6, 40, num_hidden_layers=1)
    if main is learn_cli.main:
        model.save_pretrained(tmp_path / "out")
    else:
        converted(tmp_path, model, masks_for([[1, 1, 0, 1, 0, 0]], []))
    (tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times. " * 60)
    monkeypatch.setattr("learner.finetune.finetune.SAVE_EVERY", 1)  # the Trainer's checkpoints are saved too
    arguments = ["out", "trained", "--data", "text.txt", "--sequence-length", 32, "--device", "cpu", *options]
    monkeypatch.chdir(tmp_path)
    return tmp_path / "out", lambda: main([str(argument) for argument in arguments])


def test_companions_stay_as_they_are(command, tmp_path):
    source, run = command
    files = fill(source)
    assert run() == 0
    assert {name: (tmp_path / "trained" / name).read_bytes() for name in files} == files


@pytest.mark.parametrize("command", ["finetune-pruned, LoRA"], indirect=True)
def test_no_generation_config_is_invented(command, tmp_path):
    source, run = command
    byte_tokenizer().save_pretrained(source)
    (source / "generation_config.json").unlink()
    assert run() == 0
    assert not (tmp_path / "trained" / "generation_config.json").exists()


def test_what_cannot_be_copied_is_refused_before_training(command, tmp_path, capsys):
    source, run = command
    fill(source)
    (source / "LICENSE").unlink()
    (source / "LICENSE").symlink_to("/etc/passwd")
    assert run() == 2
    assert "LICENSE is a symlink to /etc/passwd" in capsys.readouterr().err
    assert not (tmp_path / "trained").exists() and not list(tmp_path.glob("*.unfinished"))
