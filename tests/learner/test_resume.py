"""An interrupted run, resumed, learns what an uninterrupted one learns."""

import json

import pytest
from helpers.learning import run
from safetensors.torch import load_file

from learner.run import training
from learner.settings import GATES

SMALL = ["--steps", 40, "--batch-size", 2, "--sequence-length", 32]


def interrupt_at(monkeypatch, step: int) -> None:
    """Ctrl-C in the middle of a step; the state is saved every 10."""
    backward = training.Training.backward

    def interrupted(self, *args, **options):
        if self._step == step:
            raise KeyboardInterrupt
        return backward(self, *args, **options)

    monkeypatch.setattr(training, "SAVE_EVERY", 10)
    monkeypatch.setattr(training.Training, "backward", interrupted)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("step", [3, 27])
def test_a_resumed_run_ends_as_if_it_had_not_been_interrupted(word_model, monkeypatch, capsys, step, gate):  # noqa: F811
    arguments = ["--data", word_model / "text.txt", "--gate", gate, *SMALL]
    assert run(word_model / "model", word_model / "whole", *arguments) == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, step)
        assert run(word_model / "model", word_model / "ckpt", *arguments) == 130
    unfinished = word_model / "ckpt.unfinished"
    assert unfinished.exists() == (step > 10), "what cannot be resumed is left behind"
    assert not (word_model / "ckpt").exists()
    if unfinished.exists():
        assert run(word_model / "model", word_model / "ckpt", *arguments) == 2
        assert "--resume" in capsys.readouterr().err
        assert run(word_model / "model", word_model / "ckpt", *arguments, "--seed", 1, "--resume") == 2
        assert "seed: 42, now 1" in capsys.readouterr().err
    assert run(word_model / "model", word_model / "ckpt", *arguments, "--sparsity", 0.5, "--resume") == 0
    whole, resumed = (load_file(word_model / name / "pruning_masks.safetensors") for name in ("whole", "ckpt"))
    assert all((whole[name] == resumed[name]).all() for name in whole)
    logs = [(word_model / name / "learning.csv").read_text() for name in ("whole", "ckpt")]
    assert logs[0] == logs[1] and len(logs[0].splitlines()) == 41
    assert not unfinished.exists()
    assert json.loads((word_model / "ckpt" / "learning.json").read_text())["job"]["settings"]["gate"] == gate


@pytest.mark.parametrize("content", [None, '{"model": '])
def test_a_run_that_ended_before_it_wrote_its_job_can_only_be_forgotten(word_model, capsys, content):  # noqa: F811
    arguments = [word_model / "model", word_model / "ckpt", "--data", word_model / "text.txt", *SMALL]
    (word_model / "ckpt.unfinished").mkdir()
    if content is not None:
        (word_model / "ckpt.unfinished" / "job.json").write_text(content)
    unread = [*arguments[:3], word_model / "none.txt", *SMALL]
    assert run(*unread) == 2, "said before the text is read"
    assert "holds an interrupted run; go on with --resume" in capsys.readouterr().err
    assert run(*arguments, "--resume") == 2
    assert "cannot be resumed; forget it with --overwrite" in capsys.readouterr().err
    assert run(*arguments, "--overwrite") == 0 and not (word_model / "ckpt.unfinished").exists()


def test_a_damaged_state_is_named(word_model, monkeypatch, capsys):  # noqa: F811
    arguments = [word_model / "model", word_model / "ckpt", "--data", word_model / "text.txt", *SMALL]
    with monkeypatch.context() as patch:
        interrupt_at(patch, 15)
        assert run(*arguments) == 130
    state = word_model / "ckpt.unfinished" / "state.pt"
    state.write_bytes(state.read_bytes()[:500])
    assert run(*arguments, "--resume") == 2
    assert f"{state} cannot be read" in capsys.readouterr().err
