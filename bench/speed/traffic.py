"""Sends requests to one server as vLLM's own benchmark does, and says how it answered.

The client is `benchmark` of vllm.benchmarks.serve, what `vllm bench serve` runs: asynchronous, streaming, in this
process. It is called and not the command, because the command cannot give token ids and a length to each request
without a tokenizer. Its per-request times become percentiles here by its own definitions:

- TTFT, time to first token: from sending a request to its first token.
- TPOT, time per output token: the rest of the request's time over its other tokens. One figure a request.
- ITL, inter-token latency: between two tokens of a request. One figure a token.
- E2E: from sending a request to its last token.
- Requests per second: requests over the time from sending the first to the last token of the last. At saturation that
  has an end in which the longest answers run almost alone; more --num-prompts make it a smaller part.

What the server did meanwhile is the difference of its own counters (/metrics).
"""

import argparse
import asyncio
import contextlib
import gc
import json
import re
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.speed.server import Server
from bench.speed.workload import Request
from pruned_vllm.common.errors import InputError

SERVED_NAME = "model"  # of both servers
PERCENTILES = (50, 90, 99)
RESET_SECONDS = 10
COUNTERS = {
    "steps": "vllm:iteration_tokens_total_count",
    "output_tokens": "vllm:generation_tokens_total",
    "preemptions": "vllm:num_preemptions_total",
    "queue_s": "vllm:request_queue_time_seconds_sum",
}

Run = dict[str, float | None]  # RUN in bench/speed/online.py


@dataclass(frozen=True)
class Scenario:
    """How requests arrive.

    Attributes:
        kind: "saturation" (all at once), "rate" (a Poisson process) or "concurrency" (so many are under way at a time).
        value: requests per second, or their number; None at saturation.
    """

    kind: str
    value: float | None = None

    @property
    def request_rate(self) -> float:
        return self.value if self.kind == "rate" and self.value is not None else float("inf")

    @property
    def max_concurrency(self) -> int | None:
        return int(self.value) if self.kind == "concurrency" and self.value is not None else None

    @property
    def name(self) -> str:
        return self.kind if self.value is None else f"{self.kind}:{self.value:g}"


def goodput_target(text: str) -> tuple[str, float]:
    """Type of a command line argument: "ttft:2000" is ("ttft", 2000.0)."""
    name, _, milliseconds = text.partition(":")
    try:
        value = float(milliseconds)
    except ValueError:
        value = 0.0
    if name not in ("ttft", "tpot", "e2el") or not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no target such as ttft:2000; ttft, tpot or e2el in milliseconds")
    return name, value


def drive(
    server: Server,
    requests: Sequence[Request],
    scenario: Scenario,
    *,
    log: Path,
    goodput_ms: Mapping[str, float] | None = None,
    seed: int = 0,
) -> Run:
    """Sends all `requests`, waits for the answers and measures. The server's prefix cache is empty at the start.

    Args:
        log: gets what vLLM's benchmark prints.
        goodput_ms: what a request must keep to count as good, by "ttft", "tpot" or "e2el".
        seed: of the arrival times at a rate.

    Raises:
        InputError: a request failed, or was not answered with as many tokens as were asked for.
    """
    reset_prefix_cache(server)
    before = read_counters(server)
    gc.collect()
    with log.open("a") as file, contextlib.redirect_stdout(file):
        result = asyncio.run(_benchmark(server, requests, scenario, goodput_ms or {}, seed))
    check_answers(result, requests, server)
    return run_metrics(result, before, read_counters(server))


async def _benchmark(
    server: Server, requests: Sequence[Request], scenario: Scenario, goodput_ms: Mapping[str, float], seed: int
) -> dict:
    import numpy
    from vllm.benchmarks.datasets import SampleRequest
    from vllm.benchmarks.serve import TaskType, benchmark

    numpy.random.seed(seed)  # arrival times are drawn from it
    samples = [
        SampleRequest(request.prompt, request.input_len, request.output_len, request_id=f"bench-{index}")
        for index, request in enumerate(requests)
    ]
    return await benchmark(
        task_type=TaskType.GENERATION,
        endpoint_type="openai",
        api_url=f"{server.url}/v1/completions",
        base_url=server.url,
        model_id=SERVED_NAME,
        model_name=SERVED_NAME,
        tokenizer=None,  # the server counts the tokens
        input_requests=samples,
        logprobs=None,
        request_rate=scenario.request_rate,
        burstiness=1.0,
        disable_tqdm=False,
        num_warmups=0,
        profile=False,
        selected_percentile_metrics=[],
        selected_percentiles=[],
        ignore_eos=True,
        goodput_config_dict=dict(goodput_ms),
        max_concurrency=scenario.max_concurrency,
        lora_modules=None,
        extra_headers=None,
        extra_body={"temperature": 0},
        ready_check_timeout_sec=0,
    )


def reset_prefix_cache(server: Server) -> None:
    """The same prompts come again in every run; none may be answered from the one before.

    Raises InputError when the server goes on refusing: blocks of a finished request are freed a moment later.
    """
    deadline = time.monotonic() + RESET_SECONDS
    while not json.loads(_fetch(f"{server.url}/reset_prefix_cache", method="POST"))["success"]:
        if time.monotonic() > deadline:
            raise InputError(f"the server does not empty its prefix cache; see {server.log}")
        time.sleep(0.2)


def read_counters(server: Server) -> dict[str, float]:
    """COUNTERS as they stand, summed up over engines."""
    return parse_counters(_fetch(f"{server.url}/metrics"))


def parse_counters(text: str) -> dict[str, float]:
    """COUNTERS in the text format of Prometheus."""
    return {
        name: sum(map(float, re.findall(rf"^{counter}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)))
        for name, counter in COUNTERS.items()
    }


def kv_cache_tokens(server: Server) -> int | None:
    """Tokens that fit into the server's KV cache, of all its engines together."""
    metrics = _fetch(f"{server.url}/metrics")
    found = re.findall(r'^vllm:cache_config_info\{.*kv_cache_size_tokens="(\d+)"', metrics, re.MULTILINE)
    return sum(map(int, found)) or None


def first_token(server: Server) -> float:
    """Asks for one token and returns the seconds from the start of the server's process until it is there."""
    body = {"model": SERVED_NAME, "prompt": [1, 2, 3, 4], "max_tokens": 1, "temperature": 0}
    _fetch(f"{server.url}/v1/completions", method="POST", body=body)
    return time.monotonic() - server.started


def _fetch(url: str, method: str = "GET", body: dict | None = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=600) as answer:
        return answer.read().decode()


def check_answers(result: Mapping, requests: Sequence[Request], server: Server) -> None:
    """Raises InputError unless every request was answered with exactly the tokens that it asked for."""
    errors = [error for error in result["errors"] if error]
    if result["failed"] or errors:
        reason = errors[0].strip().splitlines()[-1] if errors else "no reason given"
        raise InputError(f"{result['failed']} of {len(requests)} requests failed ({reason}); see {server.log}")
    asked = [request.output_len for request in requests]
    if result["output_lens"] != asked:
        wrong = sum(got != wanted for got, wanted in zip(result["output_lens"], asked, strict=True))
        raise InputError(f"{wrong} of {len(asked)} answers have another length than was asked for; see {server.log}")


def run_metrics(result: Mapping, before: Mapping[str, float], after: Mapping[str, float]) -> Run:
    """RUN of what vLLM's benchmark returns and of the server's counters before and after it."""
    count = len(result["output_lens"])
    times = list(zip(result["latencies"], result["ttfts"], result["output_lens"], strict=True))
    tpots = [(latency - ttft) / (tokens - 1) for latency, ttft, tokens in times if tokens > 1]
    done = {name: after[name] - before[name] for name in COUNTERS}
    run: Run = {
        "duration_s": result["duration"],
        "requests_per_s": result["request_throughput"],
        "output_tokens_per_s": result["output_throughput"],
        "total_tokens_per_s": result["total_token_throughput"],
        "goodput_requests_per_s": result["request_goodput"],
    }
    run |= _summary("ttft", result["ttfts"]) | _summary("tpot", tpots)
    run |= _summary("itl", [gap for gaps in result["itls"] for gap in gaps]) | _summary("e2e", result["latencies"])
    return run | {
        "steps": done["steps"],
        "mean_batch": done["output_tokens"] / done["steps"] if done["steps"] else None,
        "preemptions": done["preemptions"],
        "mean_queue_ms": done["queue_s"] / count * 1e3,
    }


def _summary(name: str, seconds: Sequence[float]) -> Run:
    """Mean and PERCENTILES in milliseconds; None of each where there are no values (one output token has no TPOT)."""
    import numpy

    figures = ["mean", *(f"p{percentile}" for percentile in PERCENTILES)]
    if not len(seconds):
        return {f"{name}_{figure}_ms": None for figure in figures}
    values = [numpy.mean(seconds), *numpy.percentile(seconds, PERCENTILES)]
    return {f"{name}_{figure}_ms": float(value) * 1e3 for figure, value in zip(figures, values, strict=True)}
