"""A dense and a pruned model under the same traffic, in turns: what online_speedup.json says of them.

    {
      "command": "python bench/online_speedup.py ...", "date": "2026-01-31T12:00:00+00:00",
      "models": {"dense": {"path", "parameters", "distinct_layer_shapes", "kv_cache_bytes_per_token",
                           "kv_cache_tokens_per_gib"}, "pruned": {...}},
      "settings": {"repeats", "seed", "max_model_len", "dtype", "load_format", "serve_arguments": [...],
                   "turns": "both servers live" or "one server at a time",
                   "memory_bytes": what the weights and the KV cache of either server take together; null: vLLM's own
                                   share of the GPU, the same for both,
                   "goodput_ms": {"ttft": 2000.0, ...} or null},
      "workload": {"name": "chat", "prompts": "random", "num_prompts",
                   "input_tokens": {"mean", "p50", "p90", "max"}, "output_tokens": {...}},
      "servers": {"dense": {"command", "weights_bytes", "kv_cache_bytes": null where vLLM chose, "kv_cache_tokens",
                            "peak_memory_bytes", "starts": [START, ...]}, "pruned": {...}},
      "scenarios": [{"name": "saturation", "kind": "saturation", "value": null,
                     "dense": {"median": RUN, "runs": [RUN, ...]}, "pruned": {...},
                     "speedups": {"requests_per_s": {"speedup", "speedup_q1", "speedup_q3", "speedup_low",
                                                     "speedup_high", "speedup_confidence": of the interval},
                                  "ttft_p50_ms": {...}, ...},
                     "ideal": {"prefill", "decode", "decode_same_batch"}, "warnings": ["noisy: ...", ...]}, ...],
      "versions": {...}, "hardware": {...}
    }

A scenario is "saturation", "rate:2" (kind "rate", value 2.0: requests per second, Poisson) or "concurrency:4" (kind
"concurrency", value 4.0). Run i of one side has run i of the other for a neighbour. A speedup above 1 is the pruned
model's gain, also where less is better. It is null where a run has no such figure (goodput without a target) or has 0.

RUN, all of them numbers or null: duration_s, requests_per_s, output_tokens_per_s, total_tokens_per_s,
goodput_requests_per_s; ttft_, tpot_, itl_ and e2e_ with each of mean_ms, p50_ms, p90_ms and p99_ms; and from the
server's counters: steps (of the engine), mean_batch (output tokens per step), preemptions, mean_queue_ms.

START: cold (whether its compile cache was empty), weights_load_s (null with dummy weights), compile_s (null where
nothing is compiled), init_engine_s (the KV cache, compiling and warming up), ready_s (from the start of the process to
the first answer of its health check) and first_token_s (to the first token of a first request of four tokens). Seconds.

The ideal is a bracket, not one figure; `ideal_speedups` says why.
"""

import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from bench.speed.engines import SETTLE_SECONDS
from bench.speed.memory import Share
from bench.speed.server import Server, console, running_server, start_times
from bench.speed.statistics import noise_warnings, speedup_statistics
from bench.speed.traffic import SERVED_NAME, Run, Scenario, drive, first_token, kv_cache_tokens
from bench.speed.turns import Servers, schedule
from bench.speed.workload import Lengths, Request
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.ideal import Case, step_bytes, step_flops

WARM_UP_REQUESTS = 4
MORE_IS_BETTER = ("requests_per_s", "output_tokens_per_s", "total_tokens_per_s", "goodput_requests_per_s")
LESS_IS_BETTER = tuple(
    f"{name}_{figure}_ms" for name in ("ttft", "tpot", "itl", "e2e") for figure in ("mean", "p50", "p90", "p99")
)


@dataclass
class Contestant:
    """A model and how it is served.

    Attributes:
        serve_arguments: of `vllm serve`, after the directory.
        log: of its server; a start replaces what it holds.
    """

    name: str
    directory: Path
    geometry: ModelGeometry
    share: Share
    serve_arguments: list[str]
    log: Path
    commands: list[str] = field(default_factory=list)
    starts: list[dict] = field(default_factory=list)
    kv_cache_tokens: int | None = None
    peak_memory_bytes: int | None = None

    @contextmanager
    def serve(self, caches: Path, warm_up: Sequence[Request], client_log: Path) -> Iterator[Server]:
        """Its server, warmed up by some requests. `caches` is a directory that lasts from start to start."""
        cache = caches / self.name
        cold = not cache.exists()
        environment = {name: value for name, value in os.environ.items() if name != "VLLM_CPU_KVCACHE_SPACE"}
        environment |= {
            "VLLM_CACHE_ROOT": str(cache / "vllm"),  # one for each, or the second finds what the first compiled
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
            "TRITON_CACHE_DIR": str(cache / "triton"),
            "VLLM_LOGGING_LEVEL": "INFO",  # its lines say how long the phases of a start took
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_SERVER_DEV_MODE": "1",  # has /reset_prefix_cache
        }
        with running_server(self.directory, self.serve_arguments, self.log, environment=environment) as server:
            times = start_times(self.log.read_text(errors="replace"))
            self.starts.append({"cold": cold, **times, "ready_s": server.ready_s, "first_token_s": first_token(server)})
            self.kv_cache_tokens = kv_cache_tokens(server)
            self.commands.append(server.command)
            tokens = f"; {self.kv_cache_tokens:,} tokens of KV cache" if self.kv_cache_tokens else ""
            console.print(f"{self.name}: ready after {server.ready_s:.0f} s{tokens}")
            drive(server, warm_up, Scenario("saturation"), log=client_log)
            yield server
            self.peak_memory_bytes = max(server.peak_memory_bytes() or 0, self.peak_memory_bytes or 0) or None

    def record(self) -> dict:
        """What online_speedup.json says of its server."""
        return {
            "command": self.commands[0],
            "weights_bytes": self.share.weights_bytes,
            "kv_cache_bytes": self.share.kv_cache_bytes,
            "kv_cache_tokens": self.kv_cache_tokens,
            "peak_memory_bytes": self.peak_memory_bytes,
            "starts": self.starts,
        }


def serve_arguments(
    *, dtype: str, max_model_len: int, load_format: str, tokenizer: bool, share: Share, more: Sequence[str]
) -> list[str]:
    """Arguments of `vllm serve`; what is not among them is vLLM's default. `more` are the user's."""
    arguments = ["--served-model-name", SERVED_NAME, "--dtype", dtype, "--max-model-len", str(max_model_len)]
    if load_format != "auto":
        arguments += ["--load-format", load_format]
    if not tokenizer:
        arguments += ["--skip-tokenizer-init"]
    if share.kv_cache_bytes is not None:
        arguments += ["--kv-cache-memory-bytes", str(share.kv_cache_bytes)]
    return [*arguments, *more]


def compare(
    contestants: Sequence[Contestant],
    requests: Sequence[Request],
    scenarios: Sequence[Scenario],
    *,
    repeats: int,
    both_live: bool,
    goodput_ms: Mapping[str, float],
    seed: int,
    client_log: Path,
    element_bytes: int,
) -> dict:
    """Runs all scenarios on the servers of both and returns "servers" and "scenarios" of online_speedup.json.

    Raises:
        InputError: a server does not come up, or a request fails.
    """
    by_name = {contestant.name: contestant for contestant in contestants}
    turns = schedule(list(by_name), scenarios, repeats, both_live)
    runs: dict[Scenario, dict[str, list[Run]]] = {scenario: {name: [] for name in by_name} for scenario in scenarios}
    client_log.write_text("")
    with (
        tempfile.TemporaryDirectory(prefix="online-speedup-") as caches,
        Servers(
            lambda name: by_name[name].serve(Path(caches), requests[:WARM_UP_REQUESTS], client_log), both_live
        ) as servers,
    ):
        if both_live:
            for name in by_name:
                servers.ensure(name)
        for number, (repeat, scenario, name) in enumerate(turns, start=1):
            server = servers.ensure(name)
            console.print(f"{number}/{len(turns)}: {scenario.name}, {name}, repeat {repeat + 1} of {repeats}")
            time.sleep(SETTLE_SECONDS)
            run = drive(server, requests, scenario, log=client_log, goodput_ms=goodput_ms, seed=seed + repeat)
            runs[scenario][name].append(run)
    lengths = [(request.input_len, request.output_len) for request in requests]
    dense, pruned = contestants
    geometries = (dense.geometry, pruned.geometry)
    return {
        "servers": {contestant.name: contestant.record() for contestant in contestants},
        "scenarios": [scenario_record(*item, geometries, lengths, element_bytes) for item in runs.items()],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def scenario_record(
    scenario: Scenario,
    runs: Mapping[str, Sequence[Run]],
    geometries: tuple[ModelGeometry, ModelGeometry],
    lengths: Sequence[Lengths],
    element_bytes: int,
) -> dict:
    """An entry of "scenarios"; `runs` and `geometries` are those of the dense model and of the pruned one."""
    dense, pruned = runs.values()
    medians = {name: _median_run(of_name) for name, of_name in runs.items()}
    dense_batch, pruned_batch = (run["mean_batch"] for run in medians.values())
    ideal = None
    if dense_batch and pruned_batch:
        ideal = ideal_speedups(*geometries, lengths, (dense_batch, pruned_batch), element_bytes)
    speedups = {name: _speedup(pruned, dense, name) for name in MORE_IS_BETTER}
    speedups |= {name: _speedup(dense, pruned, name) for name in LESS_IS_BETTER}
    # At a rate the arrival of requests decides how long a run takes.
    judged = "e2e_mean_ms" if scenario.kind == "rate" else "duration_s"
    samples = {name: [run[judged] or 0.0 for run in of_name] for name, of_name in runs.items()}
    return {
        "name": scenario.name,
        "kind": scenario.kind,
        "value": scenario.value,
        **{name: {"median": medians[name], "runs": list(of_name)} for name, of_name in runs.items()},
        "speedups": speedups,
        "ideal": ideal,
        "warnings": noise_warnings(samples, speedup_statistics(samples["dense"], samples["pruned"])),
    }


def _speedup(before: Sequence[Run], after: Sequence[Run], name: str) -> dict | None:
    """What `speedup_statistics` says of one figure of paired runs; None where a run does not have it."""
    first, second = _figures(before, name), _figures(after, name)
    return speedup_statistics(first, second) if first and second else None


def _figures(runs: Sequence[Run], name: str) -> list[float] | None:
    """One figure of each run; None where a run does not have it, or has 0."""
    figures = [value for run in runs if (value := run[name])]
    return figures if len(figures) == len(runs) else None


def _median_run(runs: Sequence[Run]) -> Run:
    """The median of each figure; None where a run does not have it."""
    values = {name: [value for run in runs if (value := run[name]) is not None] for name in runs[0]}
    return {name: median(figures) if len(figures) == len(runs) else None for name, figures in values.items()}


def ideal_speedups(
    dense: ModelGeometry,
    pruned: ModelGeometry,
    lengths: Sequence[Lengths],
    batches: tuple[float, float],
    element_bytes: int,
) -> dict[str, float]:
    """What a perfect runtime could gain on this workload, as the two figures between which its gain must lie.

    A server's time goes into prompts, which cost arithmetic, and into output tokens, which cost reading memory. How
    much into which depends on the machine, so no single ideal is given: at saturation it lies between
    - prefill: the FLOPs of all prompts, dense over pruned, and
    - decode: the bytes read for an output token, dense over pruned, each at the batch that its own server reached.
      A pruned model's cache of keys and values holds more sequences, so it reads its weights for more tokens at once.
    decode_same_batch is the second figure without that: both at the dense server's batch.

    It takes for granted that decoding is bound by memory. A batch so large that arithmetic binds gains less from a
    larger one. Below saturation the arrivals decide how many requests a second are served; the figures then bound what
    a request's time can gain.

    Args:
        batches: output tokens per step of the dense and of the pruned server, as measured.
    """

    def flops(geometry: ModelGeometry) -> float:
        return sum(step_flops(geometry, Case("prefill", 1, input_len, 1)) for input_len, _ in lengths)

    def bytes_per_token(geometry: ModelGeometry, batch: float) -> float:
        below = math.floor(batch)
        steps = (Case("decode", size, context, 0) for size in (below, below + 1))
        fewer, more = (step_bytes(geometry, step, element_bytes) for step in steps)
        return (fewer + (more - fewer) * (batch - below)) / batch

    context = mean_context(lengths)
    dense_batch, pruned_batch = batches
    dense_bytes = bytes_per_token(dense, dense_batch)
    return {
        "prefill": flops(dense) / flops(pruned),
        "decode": dense_bytes / bytes_per_token(pruned, pruned_batch),
        "decode_same_batch": dense_bytes / bytes_per_token(pruned, dense_batch),
    }


def mean_context(lengths: Sequence[Lengths]) -> int:
    """Tokens that an output token attends to on average; one of a long answer has as much weight as any other."""
    tokens = sum(output_len for _, output_len in lengths)
    return round(sum((input_len + output_len / 2) * output_len for input_len, output_len in lengths) / tokens)
