"""vLLM engines that live side by side and run the same cases in turns.

Each engine is a `vllm.LLM` with its engine core in processes of its own, and only one of them works at a time. Times
are taken by the engine core: RequestOutput.metrics carries its monotonic clock at the moment a batch was scheduled
and at its first and last token. So a decode time holds decode steps and nothing else; subtracting a run of one token
from a long run would add the noise of two prefills and of the processes between caller and engine.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from tqdm import tqdm

from bench.speed.machine import matmul_shapes
from bench.speed.memory import KV_BLOCK_TOKENS
from bench.speed.worker import PROBE
from bench.speed.workload import random_requests
from pruned_vllm.common.signals import handled
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.ideal import Case

# A vLLM worker spins on its core for one second after its last message; the other engine must not be timed meanwhile.
SETTLE_SECONDS = 1.2
SHUTDOWN_SECONDS = 30  # an engine on CPU takes about six; after five vLLM kills it by default


@contextmanager
def running_engines(options: Sequence[dict], start_seconds: list[float] | None = None) -> Iterator[list]:
    """Starts a `vllm.LLM` with each of these options and shuts all of them down at the end, also after Ctrl-C.

    `start_seconds` gets how long each took to start.
    """
    # vLLM warns with a traceback that there is no tokenizer; nothing here needs one.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM  # here, so that --help and bad input need not wait for it

    with ExitStack() as stack:
        # Not KeyboardInterrupt: while an engine starts, vLLM swallows it and waits ten minutes for the dead engine.
        stack.enter_context(handled((signal.SIGINT, signal.SIGTERM), _exit))
        engines = []
        for engine_options in tqdm(options, desc="starting engines", unit="engine"):
            started = time.monotonic()
            engine = LLM(**engine_options)
            if start_seconds is not None:
                start_seconds.append(time.monotonic() - started)
            stack.callback(engine.llm_engine.engine_core.shutdown, timeout=SHUTDOWN_SECONDS)
            engines.append(engine)
        yield engines


def measure_in_rounds(
    options: Sequence[dict],
    rounds: int,
    run: Callable[[list], dict[Any, list[list[float]]]],
    start_seconds: Sequence[list[float]] | None = None,
) -> dict[Any, list[list[float]]]:
    """Starts all engines anew for each round, in the opposite order of the round before, and runs `run` with them.

    Two engines of the same model differ by a few percent for as long as they live, since each got other memory.

    Args:
        options: of each engine.
        run: gets the engines in the order of `options`; returns lists of samples, by anything, for each engine.
        start_seconds: a list for each engine, which gets how long it took to start in each round.

    Returns:
        The lists of all rounds, one after the other.
    """
    found: dict[Any, list[list[float]]] = {}
    for number in range(rounds):
        order = range(len(options))[:: -1 if number % 2 else 1]
        taken: list[float] = []
        with running_engines([options[index] for index in order], taken) as started:
            engines = dict(zip(order, started, strict=True))
            for key, samples in run([engines[index] for index in range(len(options))]).items():
                gathered = found.setdefault(key, [[] for _ in options])
                for index, seconds in enumerate(samples):
                    gathered[index] += seconds
        if start_seconds is not None:
            for index, seconds_to_start in zip(order, taken, strict=True):
                start_seconds[index].append(seconds_to_start)
    return found


def _exit(signal_number: int, frame) -> None:
    print("\nstopping the engines", file=sys.stderr)
    sys.exit(128 + signal_number)


def engine_options(
    dense: ModelGeometry,
    cases: Sequence[Case],
    *,
    load_format: str,
    dtype: str,
    max_model_len: int,
    compile: bool,
    num_engines: int = 2,
) -> dict:
    """Arguments of `vllm.LLM` for all engines, less the model: room for the largest case, a prefill of any case in one
    step."""
    largest_batch = max(case.batch_size for case in cases)
    # One sequence more than needed, each rounded up to whole blocks. Four bytes per element hold any dtype.
    kv_cache_tokens = (largest_batch + 1) * (max_model_len + 2 * KV_BLOCK_TOKENS)
    return {
        "load_format": load_format,
        "dtype": dtype,
        "max_model_len": max_model_len,
        "enforce_eager": not compile,
        "max_num_seqs": largest_batch,
        "max_num_batched_tokens": max(max_model_len, *(case.batch_size * case.input_len for case in cases)),
        "kv_cache_memory_bytes": kv_cache_tokens * dense.kv_cache_bytes_per_token(4),
        "gpu_memory_utilization": 0.9 / num_engines,  # they share a GPU; on CPU the line above counts
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
        "disable_log_stats": False,  # without statistics RequestOutput.metrics is None
        "seed": 0,
        "worker_extension_cls": PROBE,
    }


def through_plugin(geometry: ModelGeometry) -> dict:
    """Arguments of `vllm.LLM` that load a dense model through the plugin's class: the same weights and sizes."""
    return {"hf_overrides": {"architectures": [geometry.family.pruned_architecture]}}


def probe_machine(engine, geometry: ModelGeometry, cases: Sequence[Case]) -> dict:
    """What this machine can do at best, measured by the engine's worker, while all engines are idle."""
    time.sleep(SETTLE_SECONDS)
    return engine.collective_rpc("probe_machine", args=(matmul_shapes(geometry, cases),))[0]


def random_prompts(case: Case, vocab_size: int, seed: int = 0) -> list[dict]:
    """Prompts of random token ids, the same for every engine and repeat."""
    lengths = [(case.input_len, case.output_len)] * case.batch_size
    return [{"prompt_token_ids": request.prompt} for request in random_requests(lengths, vocab_size, seed)]


def time_case(engine, case: Case, prompts: list[dict]) -> float:
    """Seconds of the timed part of one run of `case`."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=case.output_len, ignore_eos=True, detokenize=False)
    time.sleep(SETTLE_SECONDS)
    # Paused while the batch arrives: a running engine would start with the first sequence alone.
    engine.sleep(level=0)
    engine.enqueue(prompts, params, use_tqdm=False)
    engine.wake_up(tags=["scheduling"])
    metrics = [output.metrics for output in engine.wait_for_completion(use_tqdm=False)]
    if case.kind == "prefill":
        return max(m.first_token_ts for m in metrics) - min(m.scheduled_ts for m in metrics)
    return max(m.last_token_ts for m in metrics) - min(m.first_token_ts for m in metrics)


def measure(engines: Sequence, cases: Sequence[Case], vocab_size: int, repeats: int) -> dict[Case, list[list[float]]]:
    """Seconds by case, engine and repeat. Every repeat runs all engines, in the opposite order of the
    repeat before, so that both see a slow phase of the machine."""
    samples: dict[Case, list[list[float]]] = {case: [[] for _ in engines] for case in cases}
    prompts = {case: random_prompts(case, vocab_size) for case in cases}
    with tqdm(total=len(cases) * len(engines) * (repeats + 1), unit="run") as progress:
        for repeat in range(-1, repeats):  # -1 warms up
            order = list(enumerate(engines))[:: -1 if repeat % 2 else 1]
            for case in cases:
                progress.set_description(f"{case.name} " + ("warm-up" if repeat < 0 else f"repeat {repeat + 1}"))
                for index, engine in order:
                    seconds = time_case(engine, case, prompts[case])
                    if repeat >= 0:
                        samples[case][index].append(seconds)
                    progress.update()
    return samples
