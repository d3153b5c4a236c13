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
from vllm.model_executor.models.utils import extract_layer_index

from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.quantization import JOINED
from pruned_vllm.formats.quantized_tensors import expert_modules, linear_scheme
from pruned_vllm.serving.model_layout import ModelLayout
from pruned_vllm.serving.ragged_moe import RaggedExperts

logger = init_logger("vllm.pruned_vllm")  # under vLLM's own logging configuration


def check_quantized(model: nn.Module, method: str | None, layout: ModelLayout) -> None:
    """Demands that every layer of the finished `model` got what the checkpoint or the options say.

    Args:
        method: vLLM's name of the quantization; None for none.

    Raises:
        InputError: layers that the checkpoint has quantized were built for 16 bits, or the other way round, each is
            named; or nothing at all would be quantized.
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
    problems = []
    for name, kind in kinds.items():
        is_stored = _is_stored(name, layers[name], layout)
        if is_stored and kind is None:
            problems.append(f"{name}: quantized in the checkpoint, but vLLM built it for plain weights")
        if is_stored is False and kind is not None and "Online" not in kind:
            problems.append(f"{name}: plain in the checkpoint, but vLLM built it for {kind}")
    if problems:
        raise InputError(f"quantization {method!r} is not that of the checkpoint in {len(problems)} layers:", problems)
    counts = Counter(kind or "as they are" for kind in kinds.values())
    found = "; ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    logger.info_once("Layers by quantization: %s", found)


def _is_quantizable(module: nn.Module) -> bool:
    return isinstance(module, LinearBase | VocabParallelEmbedding | RoutedExperts | RaggedExperts)


def _kind(module: Any) -> str | None:
    """What quantizes a layer; None where nothing does."""
    if isinstance(module, RaggedExperts):
        return None if module.scheme is None else f"experts: {module.scheme}"
    scheme = getattr(module, "scheme", None)
    name = type(module.quant_method if scheme is None else scheme).__name__
    return None if name.startswith("Unquantized") else name


def _is_stored(name: str, module: nn.Module, layout: ModelLayout) -> bool | None:
    """Whether the checkpoint has a layer quantized; None where config.json does not tell, or nobody need ask."""
    quantization, geometry = layout.quantization, layout.geometry
    if quantization is None or quantization.by_tensors or isinstance(module, RaggedExperts):
        return None
    if isinstance(module, RoutedExperts):
        experts = expert_modules(geometry, extract_layer_index(name))
        return any(quantization.scheme_of(expert) is not None for expert in experts)
    parent, _, last = name.rpartition(".")
    if last == "gate":  # a router, which has this name in all families
        return False
    stored_name = f"{parent}.{JOINED.get(last, (last,))[0]}" if parent else name
    return linear_scheme(geometry, quantization, stored_name) is not None
