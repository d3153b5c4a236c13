"""Layers that vLLM has no word for: each computes with weights at their real size."""
