"""The content of `convert-pruned inspect --json`. Pure Python: --help should not wait for torch."""

BATCH_SIZES = (1, 8, 64)
CONTEXT = 1024  # tokens of every sequence in the batch, for the ideal speedup
ALIGNMENTS = (8, 16, 64)

# The content of --json; a key is there in every case, null where nothing is known.
JSON_KEYS = {
    "path": "what was inspected",
    "kind": '"converted" (a result of convert-pruned), "stock" (the sizes that its config.json says), "pruned" (to be '
    "converted)",
    "format": "the value of --from that reads it; null for a converted model",
    "method": "what pruned it",
    "model_type, head_dim, hidden_size, vocab_size": "as in config.json",
    "dtypes": "of the tensors",
    "quantization": "null, or {scheme, format, num_bits, group_size, ideal_speedup} of quantized weights: scheme is "
    "one of quantize-pruned's, or what config.json calls the method; ideal_speedup is by batch size, in bytes of a "
    "decoding step, over the same model with weights as wide as its embedding's",
    "parameters, bytes, kv_cache_bytes_per_token": "each {dense, pruned}; bytes are those of the weights",
    "layers": "a list of {layer, num_attention_heads, num_key_value_heads, query_heads_per_kv_head, "
    "intermediate_size, expert_intermediate_sizes, constant_experts, skip, parameters, bytes}",
    "distinct_shapes": "number of different layers",
    "widths": "{count, multiples}: how many FFN widths, of experts too, and how many are multiples of 8, 16 and 64",
    "serving": "{architecture, needs_plugin, versions, largest_tensor_parallel_size, even_tensor_parallel_sizes, "
    "notes}",
    "ideal_speedup": "by batch size {bytes, flops}: cost of a decoding step of the dense model over the pruned one's, "
    f"with {CONTEXT:,} tokens of context",
    "notes": "what was found, and what of it converting loses",
    "unknown": "what cannot be told",
}
