"""A small model, and results like those of both speed benchmarks, of models that nothing has timed."""

import copy
import random

from bench.speed.results import describe_layer
from bench.speed.statistics import noise_warnings, speedup_statistics
from pruned_vllm.formats.layer import LayerGeometry

# config.json of a dense model; sizes are small and all different, so that sums can be written out by hand.
LLAMA_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "vocab_size": 1000,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 100,
}
DENSE = LayerGeometry((2, 2), 100), LayerGeometry((2, 2), 0, (64, 64, 64))
PRUNED = LayerGeometry((2, 1), 37), LayerGeometry((1,), 0, (64, 0, 23))
HARDWARE = {"device": "cpu", "cpu": "Imaginary 9000", "cpu_features": ["avx2"], "cpu_cores": 2, "environment": {}}
VERSIONS = {"pruned-vllm": "0.2", "vllm": "0.32.0", "torch": "2.13.0", "python": "3.11.7"}
MACHINE = {"threads": 1, "bandwidth_gb_per_s": 25.5, "gemm_tflop_per_s": 0.19, "dtype": "bfloat16"}
WHERE = {"command": "python bench/x.py --pruned out", "versions": VERSIONS, "hardware": HARDWARE}


def models(pruned_path: str = "out") -> dict:
    def model(path: str, parameters: int, layers: tuple[LayerGeometry, ...]) -> dict:
        sizes = {"parameters": parameters, "distinct_layer_shapes": len(set(layers))}
        cache = {"kv_cache_bytes_per_token": 512, "kv_cache_tokens_per_gib": 2_097_152}
        return {"path": path, **sizes, **cache, "layers": [describe_layer(layer) for layer in layers]}

    return {"dense": model("base", 123_456, DENSE), "pruned": model(pruned_path, 65_432, PRUNED)}


def offline(speedup: float = 1.6, noise: float = 0.002, pruned_path: str = "out") -> dict:
    """Two cases of seven pairs, with what the machine can do and the dense model in the plugin's class."""
    chance = random.Random(0)
    cases = []
    for name, kind, milliseconds in (("decode:8:32:64", "decode", 700), ("prefill:1:512", "prefill", 250)):
        dense = [milliseconds / 1e3 * (1 + chance.gauss(0, noise)) for _ in range(7)]
        pruned = [seconds / speedup * (1 + chance.gauss(0, noise)) for seconds in dense]
        plugin = [seconds / 1.02 for seconds in dense]
        statistics = speedup_statistics(dense, pruned)
        cases.append(
            {
                **{"name": name, "kind": kind, "batch_size": 8, "input_len": 32, "output_len": 64},
                **statistics,
                **{"ideal_speedup": 1.75, "of_ideal": statistics["speedup"] / 1.75},
                "warnings": noise_warnings({"dense": dense, "pruned": pruned}, statistics),
                "dense": _side(dense, kind),
                "pruned": _side(pruned, kind),
                "plugin_dense": _side(plugin, kind) | speedup_statistics(dense, plugin),
            }
        )
    settings = {"repeats": 7, "load_format": "auto", "dtype": "bfloat16", "max_model_len": 513, "compile": True}
    found = {"cases": cases, "models": models(pruned_path), "settings": settings, "machine": MACHINE, **WHERE}
    return copy.deepcopy(found)


def _side(seconds: list[float], kind: str) -> dict:
    middle = sorted(seconds)[3]
    shares = (
        {"of_bandwidth": 0.83, "of_gemm_rate": 0.11} if kind == "decode" else {"of_bandwidth": 0.2, "of_gemm_rate": 0.7}
    )
    rates = {"gb_per_s": 21.3, "tflop_per_s": 0.13, "step_s": middle / 63}
    return {
        "median_latency_s": middle,
        "throughput_tokens_per_s": 504 / middle,
        "samples_s": seconds,
        **rates,
        **shares,
    }


def online() -> dict:
    """Saturation, two rates and one concurrency, three runs of each model."""
    scenarios = [
        _scenario(name, gain)
        for name, gain in (("saturation", 1.55), ("rate:1", 1.0), ("rate:2", 1.0), ("concurrency:4", 1.5))
    ]
    server = {
        **{"command": "vllm serve base", "weights_bytes": 2**30, "kv_cache_bytes": 2**31, "kv_cache_tokens": 54_321},
        "peak_memory_bytes": 3 * 2**30,
        "starts": [
            {"cold": True, "weights_load_s": None, "init_engine_s": 51.5, "compile_s": 41.0, "ready_s": 77.7},
            {"cold": False, "init_engine_s": 9.5, "compile_s": None, "ready_s": 33.3, "first_token_s": 34.0},
        ],
    }
    settings = {"repeats": 3, "turns": "both servers live", "goodput_ms": None, "serve_arguments": ["--seed", "1"]}
    settings |= {"dtype": "bfloat16", "load_format": "auto"}
    workload = {"name": "chat", "num_prompts": 24, "input_tokens": {"mean": 221.5, "p50": 160}}
    found = {"scenarios": scenarios, "models": models(), "settings": settings, "workload": workload}
    return copy.deepcopy({**found, "servers": {"dense": server, "pruned": server}, "date": "2026-01-31", **WHERE})


def _scenario(name: str, gain: float) -> dict:
    kind, _, value = name.partition(":")
    sides = {
        side: [_run(float(value or 3) * factor * (1 + 0.01 * index), 900 / factor) for index in range(3)]
        for side, factor in (("dense", 1.0), ("pruned", gain))
    }
    figures = [key for key, value in sides["dense"][0].items() if value is not None]
    speedups = {}
    for figure in figures:
        dense, pruned = ([run[figure] for run in sides[side]] for side in ("dense", "pruned"))
        more_is_better = figure.endswith("per_s")
        speedups[figure] = speedup_statistics(pruned, dense) if more_is_better else speedup_statistics(dense, pruned)
    return {
        **{"name": name, "kind": kind, "value": float(value) if value else None},
        **{side: {"median": runs[1], "runs": runs} for side, runs in sides.items()},
        "speedups": speedups | {"goodput_requests_per_s": None},
        "ideal": {"prefill": 1.9, "decode": 1.7, "decode_same_batch": 1.62},
        "warnings": [f"noisy: {name}"],
    }


def _run(rate: float, latency: float) -> dict:
    latencies = {
        f"{name}_{percentile}_ms": latency * share * factor
        for name, share in (("ttft", 1), ("tpot", 0.1), ("itl", 0.09), ("e2e", 9))
        for percentile, factor in (("mean", 1.1), ("p50", 1), ("p90", 1.5), ("p99", 2.1))
    }
    throughput = {"requests_per_s": rate, "output_tokens_per_s": rate * 180, "goodput_requests_per_s": None}
    return {**throughput, **latencies, "mean_batch": 3.5}
