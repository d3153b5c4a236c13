"""Times contestants, which compute the same layer of routed experts, in turns on the same routing.

record = time_case(contestants(RandomExperts(layer, "cpu")), x, layer, repeats=15)
"""

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

from bench.experts.contestants import Contestant
from bench.experts.layers import Layer
from bench.speed.statistics import quartiles, ratios
from pruned_vllm.common.errors import InputError

SHORT_CASE_SECONDS, MOST_REPEATS = 1.0, 200  # on CPU, short cases repeat for this long
DO_BENCH_MS = {"warmup": 2, "rep": 15}


def route(tokens: int, num_experts: int, top_k: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Router weights [tokens, top_k] float32, and ids, int32, different ones for a token; in CPU memory."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, num_experts, generator=generator).topk(top_k).indices
    return torch.rand(tokens, top_k, generator=generator).softmax(1), ids.to(torch.int32)


Timer = Callable[[torch.Tensor, torch.Tensor], float]  # router weights, ids -> seconds


def cpu_timer(contestant: Contestant, x: torch.Tensor, top_k: int) -> Timer:
    def seconds(weights: torch.Tensor, ids: torch.Tensor) -> float:
        start = time.perf_counter()
        contestant.run(x, weights, ids)
        return time.perf_counter() - start

    return seconds


def cuda_timer(contestant: Contestant, x: torch.Tensor, top_k: int) -> Timer:
    """Captures a call into a CUDA graph. The graph reads its routing from buffers, which every repeat overwrites."""
    from triton.testing import do_bench

    # The ids of a token differ, which kernels may rely on.
    ids = torch.arange(top_k, dtype=torch.int32, device="cuda").repeat(len(x), 1)
    weights = torch.ones(len(x), top_k, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles kernels
            contestant.run(x, weights, ids)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        contestant.run(x, weights, ids)

    def seconds(new_weights: torch.Tensor, new_ids: torch.Tensor) -> float:
        weights.copy_(new_weights)
        ids.copy_(new_ids)
        return do_bench(graph.replay, **DO_BENCH_MS, return_mode="median") / 1e3

    return seconds


def check_outputs(contestants: Sequence[Contestant], x: torch.Tensor, layer: Layer) -> None:
    """Raises InputError where two that compute the same layer disagree."""
    weights, ids = (part.to(x.device) for part in route(len(x), len(layer.widths), layer.top_k, seed=0))
    outputs = {contestant.name: contestant.run(x, weights, ids).double() for contestant in contestants}
    for pruned in (False, True):
        first, *others = [contestant for contestant in contestants if contestant.is_pruned == pruned]
        expected = outputs[first.name]
        for other in others:
            largest = expected.abs().max().clamp_min(1e-30)  # 0 where all chosen experts are empty
            error = ((expected - outputs[other.name]).abs().max() / largest).item()
            if not error <= other.tolerance:
                raise InputError(
                    f"{layer.name}: {first.name!r} and {other.name!r} differ by {error:.1%} of the largest output"
                )


def time_case(contestants: Sequence[Contestant], x: torch.Tensor, layer: Layer, repeats: int) -> dict:
    """The record of one layer and number of tokens. Raises InputError where outputs disagree."""
    new_timer, most = (cuda_timer, repeats) if x.is_cuda else (cpu_timer, max(repeats, MOST_REPEATS))
    check_outputs(contestants, x, layer)
    timers = [new_timer(contestant, x, layer.top_k) for contestant in contestants]
    seconds: list[list[float]] = [[] for _ in contestants]
    chosen: list[list[int]] = []  # ids of each repeat
    started = time.perf_counter()
    for repeat in range(-1, most):  # -1 warms up
        if repeat >= repeats and time.perf_counter() - started > SHORT_CASE_SECONDS:
            break
        weights, ids = route(len(x), len(layer.widths), layer.top_k, seed=1 + repeat)
        order = [(repeat + turn) % len(timers) for turn in range(len(timers))]
        taken = {index: timers[index](weights, ids) for index in order}
        if repeat >= 0:
            chosen.append(ids.flatten().tolist())
            for index, duration in taken.items():
                seconds[index].append(duration)
    return summarise(contestants, seconds, chosen, layer.hidden_size)


def summarise(
    contestants: Sequence[Contestant], seconds: list[list[float]], chosen: list[list[int]], hidden_size: int
) -> dict:
    """Medians of each contestant. What is not quantized is compared with "ragged", which comes first; a quantized layer
    with the dense one: vLLM's, which comes last of these, where there is one."""
    dense = max(place for place, contestant in enumerate(contestants) if not contestant.is_pruned)
    records = {}
    for place, (contestant, durations) in enumerate(zip(contestants, seconds, strict=True)):
        read = [_bytes(contestant, ids) for ids in chosen]
        flops = [2 * 3 * hidden_size * sum(contestant.widths[expert] for expert in ids) for ids in chosen]
        record = {
            "median_s": median(durations),
            "gb_per_s": median(count / second for count, second in zip(read, durations, strict=True)) / 1e9,
            "tflop_per_s": median(done / second for done, second in zip(flops, durations, strict=True)) / 1e12,
            "samples_s": durations,
        }
        slow, fast = (dense, place) if contestant.scheme else (place, 0)
        if slow != fast:
            key = "speedup_over_dense" if contestant.scheme else "speedup_of_ragged"
            record |= _speedup(key, contestants[slow], contestants[fast], seconds[slow], seconds[fast], chosen)
        records[contestant.name] = record
    return {"repeats": len(chosen), "contestants": records}


def _speedup(
    key: str, slow: Contestant, fast: Contestant, slow_s: list[float], fast_s: list[float], chosen: list[list[int]]
) -> dict:
    speedups = ratios(slow_s, fast_s)
    # Where all chosen experts are empty nothing is read; count a byte, so as not to divide by zero.
    ideals = [_bytes(slow, ids) / max(1, _bytes(fast, ids)) for ids in chosen]
    q1, speedup, q3 = quartiles(speedups)
    return {
        key: speedup,
        "speedup_q1": q1,
        "speedup_q3": q3,
        "ideal_speedup": sum(slow.expert_bytes) / sum(fast.expert_bytes),
        "of_ideal": median(ratio / ideal for ratio, ideal in zip(speedups, ideals, strict=True)),
    }


def _bytes(contestant: Contestant, ids: Sequence[int]) -> int:
    """What is read for a routing: each chosen expert once."""
    return sum(contestant.expert_bytes[expert] for expert in set(ids))
