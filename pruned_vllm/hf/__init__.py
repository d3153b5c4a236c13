"""Converted models in Transformers: `load_pruned`, and the one config class that Transformers lacks."""

from pruned_vllm.hf.loading import load_pruned

__all__ = ["load_pruned"]
