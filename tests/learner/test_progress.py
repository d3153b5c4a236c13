"""Every long phase shows its progress, and defaults fit the model."""

import io
import json
import sys

import pytest
from helpers.learning import run
from helpers.tiny import byte_tokenizer, converted, masks_for, tiny_model

from learner.finetune import cli as finetune_cli
from pruned_vllm.common.progress import progress_bar

POSITIONS = 256  # of tiny models: fewer than any method's default
GRADIENTS = ["--steps", 1, "--batch-size", 2]
METHODS = {  # options, and the phases that are shown besides reading and measuring
    "ddp": (GRADIENTS, ["ddp"]),
    "maskprune": (GRADIENTS, ["maskprune"]),
    "wanda": (["--calibration-sequences", 2], ["wanda"]),
    "tyr": (
        ["--calibration-sequences", 2, "--iterations", 1, "--generations", 1, "--offspring", 2],
        ["tyr 1/1 candidates", "tyr 1/1 search"],
    ),
    "magnitude": ([], ["magnitude"]),
}


@pytest.mark.parametrize("method", METHODS)
def test_methods_show_their_phases_and_take_as_long_sequences_as_the_model(word_model, capsys, method):
    options, phases = METHODS[method]
    text = word_model / "text.txt"
    arguments = ["--method", method, *options, *(["--data", text] if method != "magnitude" else [])]
    assert run(word_model / "model", word_model / "ckpt", *arguments, "--eval-data", text) == 0
    shown = capsys.readouterr().err
    for phase in ("reading text", "dense perplexity", *phases, "masked perplexity"):
        assert f"{phase}: " in shown, phase
    assert "33" not in shown.partition("reading text")[2].partition("tokens")[0], "a total that is never reached"
    settings = json.loads((word_model / "ckpt" / "learning.json").read_text())["job"]["settings"]
    assert settings.get("sequence_length", POSITIONS) == POSITIONS


def test_fine_tuning_too(tmp_path, capsys):
    out = converted(tmp_path, tiny_model("llama", 6, 6, 40), masks_for([[1, 1, 1, 0, 0, 0]] * 3, []))
    byte_tokenizer().save_pretrained(out)
    (tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times. " * 40)
    text = str(tmp_path / "text.txt")
    arguments = [str(out), str(tmp_path / "recovered"), "--data", text, "--eval-data", text, "--device", "cpu"]
    assert finetune_cli.main([*arguments, "--steps", "1", "--batch-size", "2"]) == 0
    shown = capsys.readouterr().err
    for phase in ("reading text", "perplexity before", "perplexity after"):
        assert f"{phase}: " in shown, phase
    job = json.loads((tmp_path / "recovered" / "finetuning.json").read_text())["job"]
    assert job["sequence_length"] == POSITIONS


@pytest.mark.parametrize("is_terminal", [False, True])
def test_log_files_are_not_flooded(monkeypatch, is_terminal):
    stream = io.StringIO()
    stream.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stderr", stream)
    now = 0.0

    def steps():
        nonlocal now
        for step in range(1000):
            now += 0.1  # seconds
            yield step

    bar = progress_bar(steps(), desc="phase", total=1000)
    bar._time, bar.start_t, bar.last_print_t = lambda: now, 0.0, 0.0
    assert list(bar) == list(range(1000))
    lines = stream.getvalue().count("\r")
    assert (lines > 100) == is_terminal and lines > 2, f"{lines} lines in 100 seconds"
