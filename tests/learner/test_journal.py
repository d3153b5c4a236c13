"""The memory of a run: what is found again after an interruption, and a log with one row for each step."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from learner.run.journal import Journal
from pruned_vllm.common.errors import InputError


def rows(path: Path) -> list[dict[str, float]]:
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def points(directory: Path, name: str) -> list[tuple[int, float]]:
    """What TensorBoard shows of one curve."""
    events = EventAccumulator(str(directory)).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def run(directory: Path, start: int, stop: int, save_at: int, slope: float = 1.0) -> Journal:
    """A run that logs steps from `start` and breaks off after `stop`."""
    journal = Journal(directory, tensorboard=directory / "board")
    state = journal.restore()
    assert (state["step"] if state else 0) == start
    for step in range(start + 1, stop + 1):
        journal.log(step, {"loss": slope * step, "mu": 0.5})
        if step == save_at:
            journal.save({"step": step, "z": torch.full((3,), slope)})
    return journal


def test_a_resumed_run_logs_each_step_once(tmp_path):
    run(tmp_path, 0, stop=7, save_at=4)  # steps 5 to 7 are lost
    journal = run(tmp_path, 4, stop=9, save_at=9, slope=0.5)
    expected = [1, 2, 3, 4, 2.5, 3, 3.5, 4, 4.5]
    assert rows(tmp_path / "learning.csv") == [
        {"step": step, "loss": loss, "mu": 0.5} for step, loss in enumerate(expected, start=1)
    ]
    journal.write_log(tmp_path / "elsewhere.csv")
    assert rows(tmp_path / "elsewhere.csv") == rows(tmp_path / "learning.csv")


def test_tensorboard_shows_each_step_once(tmp_path):
    """Each in a process of its own that ends without a word; what it logged up to the last save is on disk."""
    first = "from tests.learner.test_journal import *; run(Path(sys.argv[1]), 0, stop=7, save_at=4)"
    environment = {"PYTHONPATH": ".:tests"}
    subprocess.run([sys.executable, "-c", first, tmp_path], check=True, env=environment)
    assert [step for step, _ in points(tmp_path / "board", "loss")][:4] == [1, 2, 3, 4]
    second = "from tests.learner.test_journal import *; run(Path(sys.argv[1]), 4, stop=9, save_at=9, slope=0.5)"
    subprocess.run([sys.executable, "-c", second, tmp_path], check=True, env=environment)
    expected = [1, 2, 3, 4, 2.5, 3, 3.5, 4, 4.5]
    assert points(tmp_path / "board", "loss") == list(enumerate(expected, start=1))


def test_the_state_comes_back_as_it_was(tmp_path):
    assert Journal(tmp_path).restore() is None
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    saved = {"step": 3, "z": torch.tensor([0.5, -0.1]), "order": [3, 1], "optimizer": optimizer.state_dict()}
    Journal(tmp_path).save(saved)
    found = Journal(tmp_path).restore()
    assert torch.equal(found.pop("z"), saved.pop("z")) and found == saved
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state.pt"], "no log without rows, nothing half written"


def test_one_process_writes(tmp_path):
    journal = Journal(tmp_path, tensorboard=tmp_path / "board", is_writer=False)
    journal.log(1, {"loss": 1.0})
    journal.save({"step": 1})
    journal.write_log(tmp_path / "log.csv")
    assert not list(tmp_path.iterdir())
    Journal(tmp_path).save({"step": 1})
    assert Journal(tmp_path, is_writer=False).restore() == {"step": 1}, "all processes resume"


def test_without_a_directory_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    journal = Journal()
    journal.log(1, {"loss": 1.0})
    journal.save({"step": 1})
    assert journal.restore() is None and not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"no tensors"])
def test_a_damaged_state_is_told(tmp_path, content):
    (tmp_path / "state.pt").write_bytes(content)
    with pytest.raises(InputError, match="state.pt cannot be read .*remove .* to begin anew"):
        Journal(tmp_path).restore()


def test_the_state_runs_no_code(tmp_path):
    torch.save({"state": Path("a class that is not a tensor"), "log": []}, tmp_path / "state.pt")
    with pytest.raises(InputError, match="state.pt cannot be read"):
        Journal(tmp_path).restore()


def test_a_missing_tensorboard_is_told_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    Journal(tmp_path)
    with pytest.raises(InputError, match=r"pip install 'pruned-vllm\[data\]'"):
        Journal(tmp_path, tensorboard=tmp_path / "board")
