"""Refuses a LoRA adapter that does not fit the pruned layers, by name, before vLLM copies it into its buffers.

vLLM fails on an adapter that is too large without saying where ("size of tensor a must match the size of tensor b"),
and fills up one that is too small with zeros without a word. It has no hook for a look at an adapter, but it hands its
manager of adapters to the model (`model.lora_manager = manager`). The model gives that one manager this class in place
of its own; nothing else in vLLM changes.
"""

from typing import Any

from vllm.lora.lora_model import LoRAModel

from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.geometry import ModelGeometry


def check_adapter(lora: LoRAModel, geometry: ModelGeometry) -> None:
    """Compares an adapter (lora_a [rank, inputs], lora_b [outputs, rank] by module) with the layers as they are.

    Raises:
        InputError: with every module that does not fit.
    """
    shapes, dense_shapes = geometry.tensor_shapes(), geometry.with_layers(geometry.dense_layers).tensor_shapes()
    problems, is_dense = [], True
    for module, weights in lora.loras.items():
        name = f"{module}.weight"
        if name not in shapes:
            name = f"model.{name}"  # pooling models are trained without the prefix
        if name not in shapes and name not in dense_shapes:  # vLLM's own names, e.g. of what it warms up with
            continue
        adapter = [weights.lora_b.shape[0], weights.lora_a.shape[1]]
        is_dense = is_dense and adapter == list(dense_shapes.get(name, ()))
        if name not in shapes:
            problems.append(f"{module}: the adapter changes {adapter} weights, the pruned model has none there")
        elif adapter != list(shapes[name]):
            problems.append(f"{module}: the adapter is for {adapter}, the pruned model has {list(shapes[name])}")
    if problems:
        fits = "It fits the model before pruning. " if is_dense else ""
        raise InputError(
            f"The LoRA adapter does not fit the pruned model in {len(problems)} modules. {fits}Train an adapter on the "
            "pruned model (finetune-pruned, or PEFT on load_pruned), or merge this one before pruning:",
            problems,
        )


def checking_manager(manager: Any, geometry: ModelGeometry) -> Any:
    """`manager` (vLLM's LoRAModelManager), which from now on checks every adapter before it takes it."""

    class CheckingManager(type(manager)):
        def _add_adapter(self, lora: LoRAModel) -> None:
            check_adapter(lora, geometry)
            super()._add_adapter(lora)

    manager.__class__ = CheckingManager
    return manager
