"""Kernels for layers that stock vLLM has no kernel for. Nothing is imported here: each needs its own hardware."""
