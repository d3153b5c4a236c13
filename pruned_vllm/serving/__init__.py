"""All that needs vLLM: the served classes, tensor parallelism, ragged experts."""
