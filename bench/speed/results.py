"""What e2e_speedup.json holds, and where its parts come from. Times in seconds, sizes in bytes.

{
  "command": "python bench/e2e_speedup.py ...",
  "cases": [{
    "name": "decode:8:32:64", "kind": "decode" or "prefill", "batch_size", "input_len", "output_len",
    "speedup": median of the paired ratios, "speedup_q1", "speedup_q3": their quartiles,
    "speedup_low", "speedup_high": 95 % interval of the median (null with one repeat),
    "ideal_speedup", "of_ideal",
    "warnings": [what makes this case doubtful, in sentences],
    "dense", "pruned": {
      "median_latency_s", "throughput_tokens_per_s", "samples_s": [one of each repeat],
      "step_s": median of one step, "bytes_per_step", "flops_per_step": as bench/speed/ideal.py counts them,
      "gb_per_s", "tflop_per_s": achieved (10^9 and 10^12 a second),
      "of_bandwidth", "of_gemm_rate": shares of what this machine was measured to do; the larger one tells what binds
    },
    "plugin_dense" (with --plugin-dense): the dense weights through the plugin's class: the keys of "dense", and those
      that start with "speedup", over "dense": what of the gain is not pruning
  }],
  "models": {"dense", "pruned", "plugin_dense"?: {"path", "parameters", "distinct_layer_shapes",
    "kv_cache_bytes_per_token", "kv_cache_tokens_per_gib"}},
  "settings": {"repeats", "load_format", "dtype", "max_model_len", "compile": false where eager, "confidence": 0.95},
  "versions": {"pruned-vllm", "vllm", "torch", "transformers", "python"},
  "hardware": {"device", "cpu", "cpu_features", "cpu_cores", "memory_gib", "environment"},
  "machine": what bench/speed/machine.py measured, in the dense model's engine while all were idle: {"device": "cpu" or
    "cuda", "threads": OpenMP threads of the engine, "cores": [where they may run], "bandwidth_gb_per_s",
    "bandwidth": [{"method", "gb_per_s"}], "gemm_tflop_per_s", "gemm": [{"tokens", "in_features", "out_features",
    "tflop_per_s"}], "dtype"}
}

Results from before 0.2 lack speedup_low, speedup_high, warnings, machine and all that is per step, and have
settings.compile false where --compile was not given.
"""
