"""What this machine can do at best: how fast an engine's threads read memory, and how fast they multiply matrices.

Measured in the process of an engine while all engines are idle (bench/speed/worker.py), so with the engine's threads on
the engine's cores. Each figure is the best of several ways and of many calls: a limit, not an average.

- Bandwidth: a sum over a buffer far larger than the last-level cache, and a product of one row by a large matrix in the
  model's dtype by the kernel that vLLM picks for its linear layers, which is what decode consists of.
- GEMM rate: products by the kernel that vLLM picks and by torch's, in the model's dtype, at shapes of the model and at
  a large square.
"""

import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pruned_vllm.formats.cost import chosen_share
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.ideal import Case

if TYPE_CHECKING:
    import torch

SECONDS = 0.3  # that each way is tried for
SMALLEST_BUFFER, LARGEST_BUFFER = 256 * 2**20, 2 * 2**30  # bytes
ROW = 4096  # elements of a row of the matrix that is read for the bandwidth
SQUARE = {"cpu": 2048, "cuda": 8192}
OPENMP = ("OMP_", "GOMP_", "KMP_")  # variables that say where an engine's threads run; vLLM sets them
DEFAULT_TOKENS = 512  # of products, where no case is a prefill


def matmul_shapes(geometry: ModelGeometry, cases: Iterable[Case]) -> list[tuple[int, int, int]]:
    """Products of the dense model's layers when the prefill cases run, each once: tokens, in_features, out_features."""
    batches = {case.batch_size * case.input_len for case in cases if case.kind == "prefill"} or {DEFAULT_TOKENS}
    dense = geometry.with_layers(tuple(dict.fromkeys(geometry.dense_layers)))
    found = set()
    for index in range(len(dense.layers)):
        for name, shape in dense.layer_tensor_shapes(index).items():
            if len(shape) == 2:
                share = chosen_share(dense, index) if ".experts." in name else 1
                found |= {(max(1, round(tokens * share)), shape[1], shape[0]) for tokens in batches}
    return sorted(found)


def measure_machine(device: "torch.device", dtype: "torch.dtype", shapes: Iterable[Sequence[int]]) -> dict:
    """The record under "machine" in e2e_speedup.json (bench/speed/results.py). Products are those of `shapes`."""
    import torch

    side = SQUARE[device.type]
    with torch.inference_mode():
        bandwidth: list[dict[str, Any]] = [
            {"method": name, "gb_per_s": rate} for name, rate in bandwidths(device, dtype)
        ]
        gemm: list[dict[str, Any]] = [
            dict(zip(("tokens", "in_features", "out_features"), shape, strict=True))
            | {"tflop_per_s": gemm_rate(shape, device, dtype)}
            for shape in (*shapes, (side, side, side))
        ]
    return {
        "device": device.type,
        "threads": torch.get_num_threads(),
        "openmp": {name: value for name, value in sorted(os.environ.items()) if name.startswith(OPENMP)},
        "dtype": str(dtype).removeprefix("torch."),
        "bandwidth_gb_per_s": max(record["gb_per_s"] for record in bandwidth),
        "bandwidth": bandwidth,
        "gemm_tflop_per_s": max(record["tflop_per_s"] for record in gemm),
        "gemm": gemm,
    }


def bandwidths(device: "torch.device", dtype: "torch.dtype") -> Iterable[tuple[str, float]]:
    """Ways to read a large buffer, with the 10^9 bytes a second that they reach."""
    import torch

    size = buffer_bytes(device)
    yield "sum of float32", size / fastest(torch.sum, device, torch.ones(size // 4, device=device)) / 1e9
    rows = size // (ROW * dtype.itemsize)
    row = torch.ones(1, ROW, device=device, dtype=dtype)
    for name, multiply in linears(torch.ones(rows, ROW, device=device, dtype=dtype)):
        yield f"one row by a matrix, {name}", rows * ROW * dtype.itemsize / fastest(multiply, device, row) / 1e9


def gemm_rate(shape: Sequence[int], device: "torch.device", dtype: "torch.dtype") -> float:
    """10^12 operations a second of the faster kernel, 2 operations for a multiplication and its addition."""
    import torch

    tokens, in_features, out_features = shape
    x = torch.randn(tokens, in_features, device=device, dtype=dtype)
    weight = torch.randn(out_features, in_features, device=device, dtype=dtype)
    seconds = min(fastest(multiply, device, x) for _, multiply in linears(weight))
    return 2 * tokens * in_features * out_features / seconds / 1e12


def linears(weight: "torch.Tensor") -> list[tuple[str, Callable]]:
    """Functions of x that multiply it by `weight`, with names: torch's, and the one that vLLM's linear layers call."""
    import torch

    found: list[tuple[str, Callable]] = [("torch", lambda x: torch.nn.functional.linear(x, weight))]
    if weight.device.type == "cpu":
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        layer: Any = torch.nn.Module()
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
        found.append(("vLLM", lambda x: layer.cpu_linear(x, weight, None)))
    return found


def fastest(call: Callable, device: "torch.device", *arguments) -> float:
    """Seconds of the fastest call within SECONDS, of three at least after one that warms up."""
    import torch

    def timed() -> float:
        started = time.perf_counter()
        call(*arguments)
        if device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - started

    timed()
    ends = time.perf_counter() + SECONDS
    times: list[float] = []
    while len(times) < 3 or time.perf_counter() < ends:
        times.append(timed())
    return min(times)


def buffer_bytes(device: "torch.device") -> int:
    """Eight times the last-level cache, within bounds, and at most a quarter of the memory that is free."""
    import psutil
    import torch

    if device.type == "cpu":
        free, cache = psutil.virtual_memory().available, last_level_cache()
    else:
        free, cache = torch.cuda.mem_get_info(device)[0], torch.cuda.get_device_properties(device).L2_cache_size
    size = min(max(SMALLEST_BUFFER, 8 * cache), LARGEST_BUFFER, free // 4)
    return size - size % (ROW * 4)


def last_level_cache(caches: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Bytes of the largest cache that the first core uses; 0 where Linux does not say."""
    units, sizes = {"K": 2**10, "M": 2**20, "G": 2**30}, [0]
    for path in caches.glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * units[text[-1]] if text[-1:] in units else int(text))
    return max(sizes)
