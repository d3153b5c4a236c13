"""What e2e_speedup.json holds, and where its parts come from. Times in seconds, sizes in bytes.

{
  "command": "python bench/e2e_speedup.py ...",
  "cases": [{
    "name": "decode:8:32:64", "kind": "decode" or "prefill", "batch_size", "input_len", "output_len",
    "speedup": median of the paired ratios, "speedup_q1", "speedup_q3": their quartiles,
    "speedup_low", "speedup_high": interval of the median (null with one repeat), which holds it with
    "speedup_confidence": 0.95, or less with fewer than 6 repeats (or rounds, where there are several),
    "ideal_speedup", "of_ideal",
    "warnings": [what makes this case doubtful, in sentences],
    "dense", "pruned": {
      "median_latency_s", "throughput_tokens_per_s", "samples_s": [one of each repeat, round after round],
      "step_s": median of one step, "bytes_per_step", "flops_per_step": as pruned_vllm/formats/ideal.py counts them,
      "gb_per_s", "tflop_per_s": achieved (10^9 and 10^12 a second),
      "of_bandwidth", "of_gemm_rate": shares of what this machine was measured to do; the larger one tells what binds
    },
    "plugin_dense" (with --plugin-dense): the dense weights through the plugin's class: the keys of "dense", and those
      that start with "speedup", over "dense": what of the gain is not pruning
  }],
  "models": {"dense", "pruned", "plugin_dense"?: {"path", "parameters", "distinct_layer_shapes",
    "kv_cache_bytes_per_token", "kv_cache_tokens_per_gib",
    "layers": [{"num_attention_heads", "num_key_value_heads", "intermediate_size", "expert_intermediate_sizes"?}]}},
  "settings": {"repeats", "rounds", "load_format", "dtype", "max_model_len", "compile": false where eager},
  "versions": {"pruned-vllm", "vllm", "torch", "transformers", "python"},
  "hardware": {"device", "cpu", "cpu_features", "cpu_cores", "memory_gib", "environment"},
  "machine": what bench/speed/machine.py measured, in the dense model's engine while all were idle: {"device": "cpu" or
    "cuda", "threads": OpenMP threads of the engine, "openmp": {variable: value} that bind them to cores, "dtype",
    "bandwidth_gb_per_s": the most of "bandwidth": [{"method", "gb_per_s"}],
    "gemm_tflop_per_s": the most of "gemm": [{"tokens", "in_features", "out_features", "tflop_per_s"}]}
}

Results from before 0.2 lack speedup_low, speedup_high, warnings, machine, layers and all that is per step, and have
settings.compile false where --compile was not given.
"""

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench.speed.memory import GIB
from bench.speed.statistics import noise_warnings, speedup_statistics
from pruned_vllm.common.environment import cpu_features, cpu_name, library_versions
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.ideal import Case, step_bytes, step_flops
from pruned_vllm.formats.layer import LayerGeometry

# What changes speeds on a CPU. The third puts PyTorch's memory in huge pages.
ENVIRONMENT = (
    "VLLM_CPU_OMP_THREADS_BIND",
    "VLLM_CPU_NUM_OF_RESERVED_CPU",
    "THP_MEM_ALLOC_ENABLE",
    "OMP_NUM_THREADS",
)
CASE_KEYS = ("name", "kind", "batch_size", "input_len", "output_len")


def case_record(
    case: Case,
    samples: Mapping[str, Sequence[float]],
    geometries: Mapping[str, ModelGeometry],
    element_bytes: int,
    machine: Mapping | None = None,
    rounds: int = 1,
    tensor_bytes: Mapping[str, Mapping[str, int] | None] | None = None,
) -> dict:
    """The record of one case.

    Args:
        samples: seconds of each repeat by contestant: "dense", "pruned" and perhaps "plugin_dense".
        geometries: of the same contestants.
        machine: what `measure_machine` found; without it there are no shares of what the machine can do.
        rounds: that the samples come from, equally many from each.
        tensor_bytes: of quantized contestants, as `bench.speed.memory.loaded_bytes` has it.
    """
    dense = samples["dense"]
    statistics = speedup_statistics(dense, samples["pruned"], rounds)
    record = {key: getattr(case, key) for key in CASE_KEYS}
    for name, seconds in samples.items():
        sizes = (tensor_bytes or {}).get(name)
        record[name] = timing_record(case, seconds, geometries[name], element_bytes, machine, sizes)
    counted, other = ("bytes", "flops") if case.kind == "decode" else ("flops", "bytes")
    ideal, other_ideal = (
        record["dense"][f"{cost}_per_step"] / record["pruned"][f"{cost}_per_step"] for cost in (counted, other)
    )
    if "plugin_dense" in samples:
        record["plugin_dense"] |= speedup_statistics(dense, samples["plugin_dense"], rounds)
    return {
        **record,
        **statistics,
        "ideal_speedup": ideal,
        "of_ideal": statistics["speedup"] / ideal,
        "warnings": noise_warnings(samples, statistics) + bound_warnings(case.kind, record["dense"], other_ideal),
    }


def bound_warnings(kind: str, dense: Mapping[str, Any], other_ideal: float) -> list[str]:
    """A sentence where this machine is nearer to the limit that the ideal speedup does not count.

    Args:
        dense: the record of the dense model; without shares of what the machine can do nothing is known.
        other_ideal: the ideal speedup if operations were counted in decode, or bytes in prefill.
    """
    if "of_bandwidth" not in dense:
        return []
    limit, expected = binding(dense), "memory" if kind == "decode" else "arithmetic"
    if limit == expected:
        return []
    reached = {
        "memory": f"{dense['of_bandwidth']:.0%} of the memory bandwidth",
        "arithmetic": f"{dense['of_gemm_rate']:.0%} of the GEMM rate",
    }
    counted, other, what = {
        "decode": ("bytes", "operations", "A smaller batch is"),
        "prefill": ("operations", "bytes", "More or longer prompts are"),
    }[kind]
    return [
        f"bound by {limit}: the dense model reaches {reached[limit]} and {reached[expected]}, while the ideal speedup "
        f"of {kind} counts {counted}; in {other} it is {other_ideal:.2f}x. {what} bound by {expected}"
    ]


def binding(record: Mapping[str, Any]) -> str:
    """Which limit of the machine a contestant was nearer to: "memory" or "arithmetic"."""
    return "memory" if record["of_bandwidth"] > record["of_gemm_rate"] else "arithmetic"


def timing_record(
    case: Case,
    seconds: Sequence[float],
    geometry: ModelGeometry,
    element_bytes: int,
    machine: Mapping | None,
    tensor_bytes: Mapping[str, int] | None,
) -> dict:
    """What one contestant did in one case, and how near that is to what the machine can do."""
    typical = median(seconds)
    step = typical / case.num_steps
    moved, operations = step_bytes(geometry, case, element_bytes, tensor_bytes), step_flops(geometry, case)
    record = {
        "median_latency_s": typical,
        "throughput_tokens_per_s": case.num_timed_tokens / typical,
        "samples_s": list(seconds),
        "step_s": step,
        "bytes_per_step": moved,
        "flops_per_step": operations,
        "gb_per_s": moved / step / 1e9,
        "tflop_per_s": operations / step / 1e12,
    }
    if machine is not None:
        record["of_bandwidth"] = record["gb_per_s"] / machine["bandwidth_gb_per_s"]
        record["of_gemm_rate"] = record["tflop_per_s"] / machine["gemm_tflop_per_s"]
    return record


def describe_model(directory: Path, geometry: ModelGeometry, element_bytes: int) -> dict:
    bytes_per_token = geometry.kv_cache_bytes_per_token(element_bytes)
    return {
        "path": str(directory),
        "parameters": geometry.num_parameters,
        "distinct_layer_shapes": len(set(geometry.layers)),
        "kv_cache_bytes_per_token": bytes_per_token,
        "kv_cache_tokens_per_gib": GIB // bytes_per_token,
        "layers": [describe_layer(layer) for layer in geometry.layers],
    }


def describe_layer(layer: LayerGeometry) -> dict:
    """Heads and widths of one layer; experts only where there are some."""
    described: dict[str, Any] = {
        "num_attention_heads": layer.num_attention_heads,
        "num_key_value_heads": layer.num_key_value_heads,
        "intermediate_size": layer.intermediate_size,
    }
    if layer.expert_intermediate_sizes:
        described["expert_intermediate_sizes"] = list(layer.expert_intermediate_sizes)
    return described


def describe_versions() -> dict:
    libraries = library_versions(("pruned-vllm", "vllm", "torch", "transformers"))
    return {**libraries, "python": platform.python_version()}


def describe_hardware(device: str | None = None) -> dict:
    """`device` is that of vLLM, or this one."""
    import psutil

    if device is None:
        from vllm.platforms import current_platform

        device = current_platform.get_device_name()
    return {
        "device": device,
        "cpu": cpu_name(),
        "cpu_features": cpu_features(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    }
