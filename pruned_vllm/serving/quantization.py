"""Refuses a quantization that leaves layers as they are which it should change, and logs what became of each kind.

vLLM passes over a layer without a word where a method has nothing for it.
"""

from collections import Counter
from typing import Any

from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.quantized_tensors import linear_scheme
from pruned_vllm.serving.model_layout import ModelLayout
from pruned_vllm.serving.ragged_moe import RaggedExperts

logger = init_logger("vllm.pruned_vllm")  # under vLLM's own logging configuration

# The first of the layers in the checkpoint that a layer of vLLM joins.
_FIRST = {"qkv_proj": "q_proj", "gate_up_proj": "gate_proj"}


def check_quantized(model: nn.Module, method: str | None, layout: ModelLayout) -> None:
    """Demands that every layer of the finished `model` got what the checkpoint or the options say.

    Args:
        method: vLLM's name of the quantization; None for none.

    Raises:
        InputError: layers would stay in 16 or 32 bits, each is named; or all of them would.
    """
    if method is None:
        return
    layers = {name: module for name, module in model.named_modules() if _is_quantizable(module)}
    kinds = {name: _kind(module) for name, module in layers.items()}
    if all(kind is None for kind in kinds.values()):
        raise InputError(
            f"quantization {method!r} changes no layer of this pruned model: it is for layers that the model has not, "
            "or ignores all that it has; serve the model without it, or choose another"
        )
    left = [name for name, kind in kinds.items() if kind is None and _is_quantized_on_disk(name, layout)]
    if left:
        raise InputError(
            f"quantization {method!r}: these layers are quantized in the checkpoint, but vLLM built them without:", left
        )
    counts = Counter(kind or "as they are" for kind in kinds.values())
    logger.info_once(
        "Layers by quantization: %s", "; ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    )


def _is_quantizable(module: nn.Module) -> bool:
    return isinstance(module, LinearBase | VocabParallelEmbedding | RoutedExperts | RaggedExperts)


def _kind(module: Any) -> str | None:
    """What quantizes a layer; None where nothing does."""
    if isinstance(module, RaggedExperts):
        return None if module.scheme is None else f"experts {module.scheme}"
    scheme = getattr(module, "scheme", None)
    name = type(module.quant_method if scheme is None else scheme).__name__
    return None if name.startswith("Unquantized") else name


def _is_quantized_on_disk(name: str, layout: ModelLayout) -> bool:
    """Whether config.json says so of a layer; of routed experts `expert_scheme` has decided, and routers never are."""
    parent, _, last = name.rpartition(".")
    quantization = layout.quantization
    if quantization is None or quantization.by_tensors or last in ("gate", "experts", "routed_experts"):
        return False
    return (
        linear_scheme(layout.geometry, quantization, f"{parent}.{_FIRST.get(last, last)}" if parent else name)
        is not None
    )
