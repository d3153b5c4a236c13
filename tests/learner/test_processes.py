"""Several processes (here two on the CPU, gloo) learn what one learns, write once, and fail together."""

import csv
import json

import pytest
import torch
from helpers.learning import run
from helpers.processes import codes, in_processes
from safetensors.torch import load_file

SMALL = ["--steps", 20, "--batch-size", 3, "--micro-batch-size", 2, "--sequence-length", 32, "--device", "cpu"]


@pytest.fixture
def arguments(word_model):  # noqa: F811
    return [word_model / "model", "--data", word_model / "text.txt"]


def test_two_processes_learn_as_one_does_and_fail_together(word_model, arguments):  # noqa: F811
    text = word_model / "text.txt"
    learning = [*arguments, *SMALL, "--eval-data", text, "--tensorboard", word_model / "board"]
    calibration = [*arguments, "--method", "wanda", "--calibration-sequences", 9, "--sequence-length", 32]
    calibration += ["--device", "cpu"]
    (word_model / "copy1").mkdir()  # only one process finds its text
    (word_model / "copy1" / "text.txt").write_text(text.read_text())
    missing = [word_model / "model", word_model / "missing", "--data", word_model / "copy{rank}" / "text.txt", *SMALL]
    (word_model / "blocked.unfinished").write_text("not a directory: only the first process looks there")
    outputs = in_processes(
        [*learning, word_model / "two"],
        [*calibration, word_model / "wanda two"],
        [*learning, word_model / "two"],
        missing,
        [*learning, word_model / "blocked"],
        [*arguments, *SMALL, "--batch-size", 1, word_model / "few"],
    )
    for output in outputs:
        assert codes(output) == [0, 0, 2, 2, 2, 2], output.stdout + output.stderr
    assert "copy0/text.txt: no such file" in outputs[0].stderr
    assert "process 0: " in outputs[1].stderr and "copy0/text.txt: no such file" in outputs[1].stderr
    assert "--batch-size 1 is less than the 2 processes" in outputs[1].stderr
    assert outputs[0].stdout.count(f"Wrote {word_model / 'two'}") == 1 and "Wrote" not in outputs[1].stdout
    assert "step" in outputs[0].stderr and "step/s" not in outputs[1].stderr, "one progress bar"

    assert run(*learning, word_model / "one") == 0
    assert run(*calibration, word_model / "wanda one") == 0
    for name, atol in (("", 2e-3), ("wanda ", 0)):
        one, two = (
            load_file(word_model / f"{name}{number}" / "pruning_masks.safetensors") for number in ("one", "two")
        )
        for key, mask in one.items():
            torch.testing.assert_close(two[key], mask, atol=atol, rtol=0, msg=lambda text, key=key: f"{key}: {text}")
    results = [json.loads((word_model / name / "learning.json").read_text())["results"] for name in ("one", "two")]
    assert results[0]["masked_perplexity"] == pytest.approx(results[1]["masked_perplexity"], rel=1e-2)
    with (word_model / "two" / "learning.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == [str(step) for step in range(1, 21)]
    left = {path.name for path in word_model.iterdir()}
    assert left == {"model", "text.txt", "copy1", "blocked.unfinished", "board", "one", "two", "wanda one", "wanda two"}
