"""Converted models in Transformers: `load_pruned`."""

from pruned_vllm.hf.loading import load_pruned

__all__ = ["load_pruned"]
