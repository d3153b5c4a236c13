"""A full disk, here a limit on the size of files: a message and exit code 2, and the run can go on later."""

import pytest
from helpers.learning import run
from helpers.limits import files_of_at_most

DDP = ["--steps", 50, "--batch-size", 2, "--sequence-length", 32]
TYR = ["--method", "tyr", "--calibration-sequences", 8, "--sequence-length", 32]
TYR += ["--iterations", 1, "--generations", 1, "--offspring", 4, "--selection-tokens", 64]


@pytest.mark.parametrize(
    ("options", "limit", "can_resume"),
    [
        (DDP, 4_000, False),  # the first state of DDP
        (TYR, 20_000, True),  # candidates, beside a state
        (TYR, 400_000, True),  # the model in the end
    ],
)
def test_a_full_disk_is_told_and_the_run_goes_on(word_model, capsys, options, limit, can_resume):  # noqa: F811
    arguments = [word_model / "model", word_model / "ckpt", "--data", word_model / "text.txt", *options]
    arguments += ["--device", "cpu"]
    with files_of_at_most(limit):
        assert run(*arguments) == 2
    assert "learn-masks: cannot write" in capsys.readouterr().err
    assert (word_model / "ckpt.unfinished").exists() == can_resume
    assert {path.name for path in word_model.iterdir()} - {"ckpt.unfinished"} == {"model", "text.txt"}
    assert run(*arguments, "--resume") == 0
