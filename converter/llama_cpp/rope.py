"""Positions in a GGUF file's metadata: RoPE, its scaling, and how far a model can look back."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from converter.llama_cpp.layout import Architecture
from pruned_vllm.common.errors import InputError


@dataclass(frozen=True)
class Rope:
    """How positions are encoded.

    Attributes:
        theta: base of the frequencies.
        linear_factor: what positions are divided by; None is 1.
        frequency_factors: float32 [head_dim / 2], what each frequency is divided by; None is 1.
        context_length: tokens for which llama.cpp computes what the model does.
        notes: sentences for the user.
    """

    theta: float
    linear_factor: float | None
    frequency_factors: torch.Tensor | None
    context_length: int
    notes: tuple[str, ...] = ()


def read_rope(config: PretrainedConfig, head_dim: int, architecture: Architecture) -> Rope:
    """Reads them from a configuration of Transformers, which knows the defaults. Raises InputError."""
    parameters: dict[str, Any] = config.rope_parameters
    kind, theta = parameters.get("rope_type", "default"), float(parameters["rope_theta"])
    known = ("default", "linear", "llama3") if architecture.rope_factors else ("default", "linear")
    if kind not in known:
        raise InputError(
            f"rope_type is {kind!r}, which cannot be exported for llama.cpp's {architecture.name!r}; known: "
            f"{', '.join(known)}"
        )
    context, notes = config.max_position_embeddings, []
    if (window := _window(config)) is not None and window < context:
        notes.append(
            f"llama.cpp has no sliding window for this architecture: the model has one of {window:,} tokens, so that "
            "is the longest context for which both compute the same, and the file says no more."
        )
        context = window
    factors = None
    if kind == "llama3":
        plain = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        factors = plain / scaled
    return Rope(theta, float(parameters["factor"]) if kind == "linear" else None, factors, context, tuple(notes))


def _window(config: PretrainedConfig) -> int | None:
    """The shortest sliding window that any layer has."""
    if config.model_type == "llama":  # has the key in some files, and no window
        return None
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    return getattr(config, "sliding_window", None)
