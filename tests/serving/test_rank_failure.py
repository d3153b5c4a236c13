"""Where one tensor-parallel rank fails, all end, and the first error is in the log."""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.failing import ERROR
from helpers.serving import MHA, ODD, Geometry
from helpers.tiny import converted

from pruned_vllm.serving import rank_failure
from pruned_vllm.serving.rank_failure import failing_together

HELPERS = Path(__file__).parents[1] / "helpers"


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_the_first_rank_reports_its_error_and_others_end(monkeypatch, caplog, rank):
    ended = []
    monkeypatch.setattr(rank_failure, "get_tensor_model_parallel_rank", lambda: rank)
    monkeypatch.setattr(rank_failure, "SECONDS_TO_REPORT", 0)
    monkeypatch.setattr(rank_failure.os, "_exit", ended.append)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with pytest.raises(MemoryError) if rank == 0 else contextlib.nullcontext(), failing_together():
        raise MemoryError("no memory left")
    assert ended == [1] * (rank > 0)
    if rank:
        assert f"rank {rank} failed" in caplog.text and "MemoryError: no memory left" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("class_name", ["FailsToBeBuilt", "FailsToLoad", "FailsToRun", "FailsToComputeLogits"])
def test_all_ranks_end(tmp_path, class_name):
    model, masks = Geometry(MHA, ODD).model_and_masks()
    directory = converted(tmp_path, model, masks)
    paths = [str(HELPERS.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    command = [sys.executable, str(HELPERS / "failing.py"), str(directory), class_name]
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while ERROR not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        code = process.wait(timeout=40)  # vLLM gives processes 9 seconds to end before it kills them
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert code == 1, log.read_text()
