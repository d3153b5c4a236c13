"""`vllm serve` as a user starts it, in processes of its own, on a free port; and what its start took.

with running_server("out/", ["--dtype", "bfloat16"], Path("server.log")) as server:
    urllib.request.urlopen(f"{server.url}/health")
"""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from rich.console import Console

from pruned_vllm.common.errors import InputError
from pruned_vllm.common.signals import uninterrupted

START_SECONDS = 1800  # for a large model on a cold compile cache
STOP_SECONDS = 60
POLL_SECONDS = 0.25
LOG_LINES = 15  # of a server that fails

console = Console(highlight=False)


@dataclass(frozen=True)
class Server:
    """A server that answers.

    Attributes:
        url: without a path, e.g. "http://127.0.0.1:41234".
        process: of `vllm serve`; its children do the work.
        started: time.monotonic() when the process was started.
        ready_s: seconds from then to the first answer of the health check.
    """

    url: str
    process: subprocess.Popen
    log: Path
    command: str
    started: float
    ready_s: float

    def peak_memory_bytes(self) -> int | None:
        """The most memory that each process had in RAM so far, summed up; on a GPU, what they have on it now.

        Pages that processes share, such as libraries, count in each. None where nvidia-smi does not show processes.
        """
        import psutil
        from vllm.platforms import current_platform

        root = psutil.Process(self.process.pid)
        tree = {process.pid for process in (root, *root.children(recursive=True))}
        return _peak_ram(tree) if current_platform.is_cpu() else _gpu_memory(tree)


def _peak_ram(pids: set[int]) -> int:
    total = 0
    for pid in pids:
        with suppress(OSError):  # a process that has ended
            if found := re.search(r"^VmHWM:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE):
                total += int(found[1]) * 1024
    return total


def _gpu_memory(pids: set[int]) -> int | None:
    query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return None
    used = [memory for pid, memory in (line.split(",") for line in lines if "," in line) if int(pid) in pids]
    return sum(int(memory) for memory in used) * 2**20 if used else None


@contextmanager
def running_server(
    model: Path | str,
    arguments: Sequence[str],
    log: Path,
    *,
    environment: Mapping[str, str] | None = None,
    timeout: float = START_SECONDS,
) -> Iterator[Server]:
    """Starts `vllm serve MODEL ARGUMENTS` and yields the server when it answers; stops it at the end.

    Args:
        environment: all variables that it gets; default: this process's.
        timeout: seconds that it may take to answer.

    Raises:
        InputError: it ended or did not answer in time; the message has the end of `log`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    vllm = Path(sys.executable).with_name("vllm")
    words = ["serve", str(model), *arguments, "--host", "127.0.0.1", "--port", str(port)]
    command = f"vllm {shlex.join(words)}"
    console.print(f"[bold cyan]$ {command}", soft_wrap=True)
    started = time.monotonic()
    with log.open("w") as log_file:
        # A session of its own: Ctrl-C reaches this process alone, which then stops the server in order.
        process = subprocess.Popen(
            [str(vllm), *words], stdout=log_file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(process, url, log, started + timeout)
        yield Server(url, process, log, command, started, time.monotonic() - started)
    finally:
        with uninterrupted():
            _stop(process)


def _wait_until_ready(process: subprocess.Popen, url: str, log: Path, deadline: float) -> None:
    with console.status("waiting for the server"):
        while process.poll() is None and time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=10):
                    return
            except OSError:  # refused, or not answered
                time.sleep(POLL_SECONDS)
    code = process.poll()
    what = "did not answer in time" if code is None else f"ended with exit code {code}"
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:])
    raise InputError(f"vllm serve {what}; the end of {log}:\n{tail}")


def _stop(process: subprocess.Popen) -> None:
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=STOP_SECONDS)
    with suppress(ProcessLookupError):  # its engine's processes, should they still be there
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


_SECONDS = r"([\d.]+) s"
_WARMING = ("Warming up model for the compilation", "Warming up done")  # what vLLM says on CPU, where it compiles there


def start_times(log: str) -> dict[str, float | None]:
    """Seconds of the phases of a start, as vLLM's log says them; null what it does not say. The slowest rank counts."""

    def longest(pattern: str) -> float | None:
        return max(map(float, re.findall(pattern, log)), default=None)

    compile_s = longest(rf"\(compilation: {_SECONDS}")
    begins, ends = (_time_of(text, log) for text in _WARMING)
    if compile_s is None and begins and ends:
        compile_s = (ends - begins).total_seconds()
    return {
        "weights_load_s": longest(rf"Loading weights took {_SECONDS}"),
        "compile_s": compile_s,
        "init_engine_s": longest(rf"init engine \(.*?\) took {_SECONDS}"),
    }


def _time_of(text: str, log: str) -> datetime | None:
    """When the first line with `text` was written, to the second; vLLM writes no year."""
    found = re.search(rf"(\d\d-\d\d \d\d:\d\d:\d\d) .*{re.escape(text)}", log)
    return datetime.strptime(f"2000-{found[1]}", "%Y-%m-%d %H:%M:%S") if found else None


@contextmanager
def served(
    model: Path,
    log: Path,
    name: str,
    dtype: str = "float32",
    hf_overrides: Mapping | None = None,
    tokenizer: Path | None = None,
):
    """Serves a model, eager, and yields an OpenAI client. Raises InputError as `running_server` does.

    Args:
        hf_overrides: keys of config.json that are others.
        tokenizer: the directory that it is in, where that is not the model's.
    """
    from openai import OpenAI

    environment = (
        {"VLLM_CPU_KVCACHE_SPACE": "1"} | os.environ | {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    )
    options = ["--dtype", dtype, "--enforce-eager", "--served-model-name", name]
    if hf_overrides is not None:
        options += ["--hf-overrides", json.dumps(hf_overrides)]
    if tokenizer is not None:
        options += ["--tokenizer", str(tokenizer)]
    with running_server(model, options, log, environment=environment) as server:
        yield OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
