"""Models whose class comes with the checkpoint, because Transformers has none: DeepSeekMoE-16B.

Its published code was written for Transformers 4. What it takes to run it with 5, and to learn on it:
- It imports `is_torch_fx_available`, which is gone.
- It takes any `config.rope_scaling` for scaled; Transformers 5 fills one in for models that do not scale.
- It makes caches of a kind that is gone, unless `use_cache` is off. Learning needs none.
- Its constructor computes rotary frequencies into buffers. Transformers 5 runs constructors without memory, and
  leaves uninitialised in foreign code what no file holds: the model would run, and print garbage.
- In training mode, in which alone its experts have gradients, each router adds a balancing loss to the gradients,
  whatever loss is minimised. Masks must not learn from it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import import_utils

from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.geometry import ModelGeometry


def brings_code(model: nn.Module) -> bool:
    """Whether the class of a model came with its checkpoint. Pruned models have classes of this package."""
    # Sharding puts a class of its own in front.
    first = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
    return first.__module__.startswith("transformers_modules.")  # where Transformers puts such code


def load_with_its_code(
    name: str, stored: Mapping[str, Any], geometry: ModelGeometry, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Runs the code and returns the model, and what Transformers says about loading it.

    Args:
        name: directory or hub id.
        stored: its config.json.
        geometry: of the model.
        options: for from_pretrained.

    Raises:
        InputError: there is no code.
    """
    if not hasattr(import_utils, "is_torch_fx_available"):
        import_utils.is_torch_fx_available = lambda: True
    if "AutoConfig" not in (stored.get("auto_map") or {}):
        raise InputError(f"{name} brings no code: its config.json has no auto_map that names it")
    # Not with AutoConfig: it prefers the class that is registered for serving, which lacks what the code needs.
    config = get_class_from_dynamic_module(stored["auto_map"]["AutoConfig"], name).from_pretrained(name)
    config.use_cache = False
    if "rope_parameters" not in stored:  # which Transformers 5 writes in place of rope_scaling
        config.rope_parameters = stored.get("rope_scaling")
    model, loading = AutoModelForCausalLM.from_pretrained(
        name, config=config, trust_remote_code=True, output_loading_info=True, **options
    )
    with init_empty_weights(include_buffers=False):
        constructed = AutoModelForCausalLM.from_config(config, trust_remote_code=True, dtype=model.dtype)
    for path, buffer in constructed.named_non_persistent_buffers():
        module, _, buffer_name = path.rpartition(".")
        model.get_submodule(module).register_buffer(buffer_name, buffer, persistent=False)
    for index, layer in enumerate(geometry.layers):
        if layer.expert_intermediate_sizes:
            router = model.model.layers[index].get_submodule(geometry.family.experts_format.router)
            router.register_forward_hook(_detach_losses)
    return model, loading


def _detach_losses(router: nn.Module, args: tuple, output: Any) -> Any:
    """Of the chosen experts, their weights and a loss that a router returns, the loss is what has no dimensions."""
    if not isinstance(output, tuple):
        return output
    return tuple(part.detach() if isinstance(part, torch.Tensor) and part.ndim == 0 else part for part in output)
