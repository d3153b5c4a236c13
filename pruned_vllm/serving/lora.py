"""Refuses a LoRA adapter that does not fit the pruned layers, by name, before vLLM copies it into its buffers.

vLLM fails on an adapter that is too large without saying where ("size of tensor a must match the size of tensor b"),
and fills up one that is too small with zeros without a word. It has no hook for a look at an adapter, but it hands its
manager of adapters to the model (`model.lora_manager = manager`). The model gives that one manager this class in place
of its own; nothing else in vLLM changes.
"""

from collections.abc import Collection
from typing import Any

from vllm.lora.lora_model import LoRAModel

from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.geometry import ModelGeometry


def check_adapter(lora: LoRAModel, geometry: ModelGeometry, targets: Collection[str]) -> None:
    """Compares an adapter (lora_a [rank, inputs], lora_b [outputs, rank] by module) with the layers as they are.

    Args:
        targets: the modules that vLLM applies adapters to, by name.

    Raises:
        InputError: with every module that does not fit, or that vLLM would leave out without a word.
    """
    shapes, dense_shapes = geometry.tensor_shapes(), geometry.with_layers(geometry.dense_layers).tensor_shapes()
    problems, is_dense = [], True
    for name, weights in lora.loras.items():
        module = name if name in targets or name.startswith("model.") else f"model.{name}"  # pooling models lack it
        shape, dense_shape = (where.get(f"{module}.weight") for where in (shapes, dense_shapes))
        if shape is None and module in targets:  # vLLM's own names, e.g. in what it warms up with
            continue
        adapter = (weights.lora_b.shape[0], weights.lora_a.shape[1])
        is_dense = is_dense and adapter == dense_shape
        if shape is None:
            problems.append(f"{name}: the adapter is for {list(adapter)}, the pruned model has no such module")
        elif adapter != shape:
            problems.append(f"{name}: the adapter is for {list(adapter)}, the pruned model has {list(shape)}")
        elif module not in targets:
            problems.append(f"{name}: vLLM applies no adapter to this module of a pruned model")
    if problems:
        fits = "It fits the model before pruning. " if is_dense else ""
        raise InputError(
            f"The LoRA adapter does not fit the pruned model in {len(problems)} modules. {fits}Train an adapter on the "
            "pruned model (PEFT on load_pruned), or merge this one into the model before it is pruned:",
            problems,
        )


def checking_manager(manager: Any, geometry: ModelGeometry) -> Any:
    """`manager` (vLLM's LoRAModelManager), which from now on checks every adapter before it takes it."""
    packed = manager.packed_modules.values()  # what vLLM fuses: the names in adapters
    targets = {*manager.modules, *(name for names in packed for name in names)}
    if manager.lora_config.target_modules is not None:  # leaving other modules out was asked for
        targets |= {name.removesuffix(".weight") for name in geometry.tensor_shapes()}

    stock_class: Any = type(manager)

    class CheckingManager(stock_class):
        def _add_adapter(self, lora: LoRAModel) -> None:
            check_adapter(lora, geometry, targets)
            super()._add_adapter(lora)

    manager.__class__ = CheckingManager
    return manager
