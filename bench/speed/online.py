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
                                                     "speedup_high"}, "ttft_p50_ms": {...}, ...},
                     "ideal": {"prefill", "decode", "decode_same_batch"}}, ...],
      "versions": {...}, "hardware": {...}
    }

A scenario is "saturation", "rate:2" (kind "rate", value 2.0: requests per second, Poisson) or "concurrency:4" (kind
"concurrency", value 4.0). Run i of one side has run i of the other for a neighbour. A speedup above 1 is the pruned
model's gain, also where less is better. It is null where a run has no such figure (goodput without a target).

RUN, all of them numbers or null: duration_s, requests_per_s, output_tokens_per_s, total_tokens_per_s,
goodput_requests_per_s; ttft_, tpot_, itl_ and e2e_ with each of mean_ms, p50_ms, p90_ms and p99_ms; and from the
server's counters: steps (of the engine), mean_batch (output tokens per step), preemptions, mean_queue_ms.

START: cold (whether the compile cache was empty), weights_load_s (null with dummy weights), model_load_s,
compile_s (null where nothing is compiled), ready_s (from the start of the process to the first answer of its health
check), first_token_s (from there to the first token of a first short request). All in seconds, null where vLLM's log
does not say.

The ideal is a bracket, not one figure: see `ideal_speedups` in bench/speed/ideal.py.
"""
