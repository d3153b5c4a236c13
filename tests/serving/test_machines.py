"""A pruned model in two engines, and on two machines, gives the masked model's tokens, through `vllm serve`.

The machines are two network namespaces with a cable between them, which share nothing but files. Making them takes
root and the command `ip`.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.serving import NUM_TOKENS, ODD, UNEVEN, Geometry, assert_is_the_masked_model
from helpers.tiny import converted, prompts

pytestmark = pytest.mark.slow

GEOMETRY = Geometry(UNEVEN, ODD, "qwen3", 4, config={"vocab_size": 331})
NAME = "pruned"
URL = "http://127.0.0.1:8077"
OPTIONS = [
    *("--served-model-name", NAME, "--skip-tokenizer-init", "--dtype", "float32", "--enforce-eager"),
    *("--max-model-len", "128", "--host", "127.0.0.1", "--port", URL.rpartition(":")[2]),
]
# Run by another process, since this one is on neither of the machines.
FETCH = """
import sys, urllib.request
headers = {"Content-Type": "application/json"}
request = urllib.request.Request(sys.argv[1], sys.argv[2].encode() or None, headers)
print(urllib.request.urlopen(request, timeout=60).read().decode())
"""


class Server:
    """`vllm serve` of one model, in as many processes as `start` is called; they end with the context."""

    def __init__(self, log: Path, on_machine: list[str]) -> None:
        self.log = log
        self.on_machine = on_machine  # what precedes a command that runs on the machine of the HTTP server
        self.processes: list[subprocess.Popen] = []

    def start(self, command: list[str], environment: dict[str, str]) -> None:
        variables = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"} | environment
        with self.log.open("a") as file:
            self.processes.append(subprocess.Popen(command, env=variables, stdout=file, stderr=file))

    def fetch(self, path: str, body: dict | None = None) -> str:
        command = [*self.on_machine, sys.executable, "-c", FETCH, URL + path, json.dumps(body) if body else ""]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def wait(self) -> None:
        deadline = time.monotonic() + 400
        while time.monotonic() < deadline and all(process.poll() is None for process in self.processes):
            with contextlib.suppress(subprocess.CalledProcessError):
                self.fetch("/health")
                return
            time.sleep(1)
        pytest.fail(self.log.read_text())

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *exception) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()

    def answer(self, prompt: list[int]) -> SimpleNamespace:
        """The answer to a prompt, with the attributes of vLLM's RequestOutput that the oracle looks at."""
        body = {"model": NAME, "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
        body |= {"logprobs": 5, "prompt_logprobs": 1, "return_token_ids": True, "return_tokens_as_token_ids": True}
        choice = json.loads(self.fetch("/v1/completions", body))["choices"][0]
        of_prompt = [
            {int(token): SimpleNamespace(logprob=entry["logprob"]) for token, entry in (position or {}).items()}
            for position in choice["prompt_logprobs"]
        ]
        of_output = [
            {int(name.removeprefix("token_id:")): SimpleNamespace(logprob=value) for name, value in position.items()}
            for position in choice["logprobs"]["top_logprobs"]
        ]
        output = SimpleNamespace(token_ids=choice["token_ids"], logprobs=of_output)
        return SimpleNamespace(prompt_logprobs=of_prompt, outputs=[output])


@pytest.fixture
def machines() -> Iterator[list[tuple[str, str, str]]]:
    """Two machines: the name of a network namespace, its address, its network interface."""
    names = [f"pruned-vllm-{os.getpid()}-{number}" for number in range(2)]
    machines = [(name, f"10.77.0.{number}", f"machine{number}") for number, name in enumerate(names, start=1)]

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    with contextlib.ExitStack() as stack:
        try:
            for name in names:
                ip("netns", "add", name)
                stack.callback(ip, "netns", "del", name)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces cannot be made here: {error}")
        (first, _, left), (second, _, right) = machines
        ip("link", "add", left, "netns", first, "type", "veth", "peer", "name", right, "netns", second)
        for name, address, interface in machines:
            ip("-n", name, "addr", "add", f"{address}/24", "dev", interface)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", interface, "up")
        yield machines


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The dense model, its masks, and the directory of the converted one."""
    model, masks = GEOMETRY.model_and_masks()
    return model, masks, converted(tmp_path_factory.mktemp("machines"), model, masks, GEOMETRY.site)


def serve(directory: Path, *options: str) -> list[str]:
    return [str(Path(sys.executable).with_name("vllm")), "serve", str(directory), *OPTIONS, *options]


def test_ranks_on_two_machines(tmp_path, model, machines):
    dense, masks, directory = model
    with Server(tmp_path / "log", ["ip", "netns", "exec", machines[0][0]]) as server:
        for rank, (name, address, interface) in enumerate(machines):
            options = ["-tp", "2", "--nnodes", "2", "--node-rank", str(rank), "--master-addr", machines[0][1]]
            server.start(
                ["ip", "netns", "exec", name, *serve(directory, *options, *["--headless"] * (rank > 0))],
                {"VLLM_HOST_IP": address, "GLOO_SOCKET_IFNAME": interface, "VLLM_CPU_OMP_THREADS_BIND": str(rank)},
            )
        server.wait()
        outputs = [server.answer(prompt) for prompt in prompts()]
    assert_is_the_masked_model(outputs, dense, masks, GEOMETRY.site)


def test_two_engines_share_the_requests(tmp_path, model):
    dense, masks, directory = model
    with Server(tmp_path / "log", []) as server:
        server.start(serve(directory, "--data-parallel-size", "2"), {"VLLM_CPU_OMP_THREADS_BIND": "0|1"})
        server.wait()
        with ThreadPoolExecutor(8) as pool:
            outputs = list(pool.map(server.answer, prompts() * 4))
        metrics = server.fetch("/metrics")
    finished = re.findall(r'^vllm:e2e_request_latency_seconds_count{engine="(\d)".*} (\S+)$', metrics, re.M)
    for start in range(0, len(outputs), len(prompts())):
        assert_is_the_masked_model(outputs[start : start + len(prompts())], dense, masks, GEOMETRY.site)
    counts = {engine: float(count) for engine, count in finished}
    assert counts.keys() == {"0", "1"} and min(counts.values()) > 0 and sum(counts.values()) == len(outputs)
