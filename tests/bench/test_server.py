"""A server is started on a free port, waited for, and gone afterwards, with commands that only play `vllm serve`."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.speed import server as server_module
from bench.speed.server import running_server, start_times
from pruned_vllm.common.errors import InputError

HEALTHY = """
import http.server, os, subprocess, sys
words = sys.argv[1:]
print(words, os.environ.get("GIVEN"), flush=True)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(words[words.index("--port") + 1])), Handler).serve_forever()
"""
FAILING = "print('the weights\\nare missing'); raise SystemExit(3)"
SILENT = "import time; print('still loading', flush=True); time.sleep(600)"


@pytest.fixture
def play(tmp_path, monkeypatch):
    """Makes a script the `vllm` beside the interpreter."""
    monkeypatch.setattr(server_module, "STOP_SECONDS", 5)

    def become(script: str) -> None:
        vllm = tmp_path / "vllm"
        vllm.write_text(f"#!{sys.executable}\n{script}")
        vllm.chmod(0o755)
        monkeypatch.setattr(server_module.sys, "executable", str(tmp_path / "python"))

    return become


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_server_answers_and_is_gone_afterwards_with_its_children(play, tmp_path):
    play(HEALTHY)
    log = tmp_path / "log"
    environment = {**os.environ, "GIVEN": "yes"}
    with running_server("model", ["--dtype", "float32"], log, environment=environment) as server:
        with urllib.request.urlopen(f"{server.url}/health") as answer:
            assert answer.status == 200
        words, child = log.read_text().splitlines()[:2]
        assert words.startswith("['serve', 'model', '--dtype', 'float32', '--host', '127.0.0.1', '--port',")
        assert words.endswith("yes") and server.command.startswith("vllm serve model --dtype float32 --host")
        pids = [server.process.pid, int(child.split()[1])]
        assert all(map(alive, pids)) and server.ready_s > 0
        assert os.getsid(server.process.pid) != os.getsid(0), "Ctrl-C must not reach it"
    deadline = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, pids))


# What runs in the background of a shell ignores Ctrl-C, and so would this: hence the handler.
INTERRUPTED = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)
from bench.speed import server
from pruned_vllm.common.command import run_command
directory = Path(sys.argv[1])
sys.executable = str(directory / "python")
def body():
    with server.running_server("model", [], directory / "log"):
        raise SystemExit("came up")
sys.exit(run_command("test", body))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_a_server_starts_leaves_none(number, play, tmp_path):
    play("import os, time; print(os.getpid(), flush=True); time.sleep(600)")
    words = [sys.orig_argv[0], "-c", INTERRUPTED, str(tmp_path)]
    command = subprocess.Popen(words, cwd=Path(__file__).parents[2], stderr=subprocess.PIPE, text=True)
    log, deadline = tmp_path / "log", time.monotonic() + 60
    while not (log.exists() and log.read_text().strip()) and time.monotonic() < deadline:
        time.sleep(0.1)
    command.send_signal(number)
    assert "test: interrupted" in command.communicate(timeout=60)[1] and command.returncode == 130
    assert not alive(int(log.read_text()))


@pytest.mark.parametrize(
    "script, message",
    [
        (FAILING, r"ended with exit code 3; the end of .*log:\nthe weights\nare missing$"),
        (SILENT, "did not answer in time"),
    ],
)
def test_a_server_that_does_not_come_up_is_reported_with_the_end_of_its_log(script, message, play, tmp_path):
    play(script)
    with (
        pytest.raises(InputError, match=f"vllm serve {message}"),
        running_server("model", [], tmp_path / "log", timeout=3),
    ):
        pytest.fail("came up")


COMPILED_ON_CPU = """\
(Worker pid=8) INFO 11-25 21:41:05 [default_loader.py:502] Loading weights took 1.25 seconds
(Worker pid=8) INFO 11-25 21:41:06 [cpu_model_runner.py:87] Warming up model for the compilation...
(Worker pid=8) INFO 11-25 21:41:52 [monitor.py:91] [backbone] Initial profiling/warmup run took 0.09 s
(Worker pid=8) INFO 11-25 21:42:10 [cpu_model_runner.py:91] Warming up done.
(EngineCore pid=7) INFO 11-25 21:42:11 [core.py:402] init engine (profile, create kv cache, warmup model) took 65.01 s
"""
EAGER_ON_CPU = """\
(EngineCore pid=7) INFO 11-25 21:42:11 [core.py:402] init engine (profile, create kv cache, warmup model) took 0.41 s
"""
TWO_GPUS = """\
(Worker_TP0 pid=8) INFO 11-25 21:41:05 [default_loader.py:502] Loading weights took 1.25 seconds
(Worker_TP1 pid=9) INFO 11-25 21:41:05 [default_loader.py:502] Loading weights took 2.50 seconds
(EngineCore pid=7) INFO 11-25 21:42:11 [core.py:402] init engine (profile, create kv cache, warmup model) took 65.01 s \
(compilation: 40.25 s)
"""


@pytest.mark.parametrize(
    "log, weights, compiled, init",
    [
        (COMPILED_ON_CPU, 1.25, 64.0, 65.01),
        (EAGER_ON_CPU, None, None, 0.41),
        (TWO_GPUS, 2.5, 40.25, 65.01),
        ("", None, None, None),
    ],
)
def test_a_log_says_how_long_the_phases_of_a_start_took(log, weights, compiled, init):
    assert start_times(log) == {"weights_load_s": weights, "compile_s": compiled, "init_engine_s": init}


def test_gpu_memory_is_that_of_the_servers_processes(monkeypatch):
    lines = "11, 500\n12, 250\n99, 4000\n"
    monkeypatch.setattr(server_module.subprocess, "run", lambda *words, **options: SimpleNamespace(stdout=lines))
    assert server_module._gpu_memory({11, 12, 13}) == 750 * 2**20
    assert server_module._gpu_memory({13}) is None, "nvidia-smi does not see into this container"
