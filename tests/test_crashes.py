"""SIGKILL at random moments: an output is none or whole, the user's files stay, and the next run cleans up."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = ("convert-pruned", "quantize-pruned", "learn-masks", "finetune-pruned")


def crash(directory: Path, command: str, kills: int, *options: str) -> None:
    tests = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "helpers.crashing", command, "--kills", str(kills), "--seed", "20251", *options]
        + ["--directory", str(directory)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    print(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_killed_at_50_random_moments(tmp_path, command):
    crash(tmp_path, command, 50)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_the_installed_command_killed(tmp_path, command):
    crash(tmp_path, command, 2, "--command")
