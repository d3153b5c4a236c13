"""A decoder layer of any geometry: the family's stock layer at the sizes of this layer, with few modules exchanged.

The stock layer's own `forward` runs. What it calls is other modules where pruning made the layer another one: attention
of uneven groups, a block of experts, and modules that do nothing where a sublayer is gone. A sublayer that is exchanged
is built first, since stock layers build all that they have, but at the smallest sizes there are (`layer_config.py`).
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from vllm.config import CompilationMode, VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.models.utils import extract_layer_index

from pruned_vllm.serving.attention import fit_projections
from pruned_vllm.serving.layer_config import layer_config
from pruned_vllm.serving.model_layout import ModelLayout
from pruned_vllm.serving.norms import AddAndNorm, RemovedNorm
from pruned_vllm.serving.ragged_moe import MoEBlock

# A stock decoder layer's class, or a function that returns one. It is called with those of `_arguments` that it names.
StockLayer = Callable[..., nn.Module]

ATTENTION, MLP = "self_attn", "mlp"  # what the sublayers are called in a stock layer


def build_layer(vllm_config: VllmConfig, model_layout: ModelLayout, stock_layer: StockLayer, prefix: str) -> nn.Module:
    """The layer of this name, e.g. "model.layers.3", as `model_layout` says."""
    index = extract_layer_index(prefix)
    geometry, layout = model_layout.geometry, model_layout.layers[index]
    sizes = geometry.layers[index]
    has_stock_mlp = sizes.intermediate_size and not sizes.expert_intermediate_sizes
    exchanged = [ATTENTION] * ("attention" in sizes.skip) + [MLP] * (not has_stock_mlp)
    exchanged = [f"{prefix}.{name}" for name in exchanged]
    layer: Any = stock_layer(
        **_arguments(layer_config(vllm_config, model_layout, index, exchanged), stock_layer, prefix)
    )
    _forget(exchanged)
    if "attention" in sizes.skip:
        removed = Removed("o_proj", geometry.hidden_size, geometry.o_bias)
        remove_sublayer(layer, ATTENTION, geometry.family.attention_norms, removed)
    elif geometry.latent is None and not sizes.linear_attention:  # these two are whole
        fit_projections(layer.self_attn, geometry, layout, vllm_config, f"{prefix}.{ATTENTION}")
    if sizes.expert_intermediate_sizes:
        layer.mlp = MoEBlock(vllm_config, model_layout, index, f"{prefix}.{MLP}")
    elif "mlp" in sizes.skip:
        removed = Removed("down_proj", geometry.hidden_size, geometry.mlp_bias)
        remove_sublayer(layer, MLP, geometry.family.mlp_norms, removed)
    if vllm_config.compilation_config.mode == CompilationMode.NONE:
        _prepare_for_eager(layer, is_first=index == 0)
    return layer


def _arguments(vllm_config: VllmConfig, stock_layer: StockLayer, prefix: str) -> dict[str, Any]:
    """What a stock layer wants to be built with, by the names that vLLM gives it."""
    config = vllm_config.model_config.hf_config
    layer_types = getattr(config, "layer_types", None)
    layer_type = None if layer_types is None else layer_types[extract_layer_index(prefix)]
    arguments = {
        "vllm_config": vllm_config,
        "config": config,
        "cache_config": vllm_config.cache_config,
        "quant_config": vllm_config.quant_config,
        "layer_type": layer_type,
        "per_layer_sliding_window": config.sliding_window if layer_type == "sliding_attention" else None,
        "prefix": prefix,
    }
    return {name: arguments[name] for name in inspect.signature(stock_layer).parameters if name in arguments}


def _forget(modules: list[str]) -> None:
    """Takes what is in these modules out of vLLM's list of layers: an attention that is there has a KV cache."""
    context = get_current_vllm_config().compilation_config.static_forward_context
    for name in list(context):
        if name.startswith(tuple(f"{module}." for module in modules)):
            del context[name]


def _prepare_for_eager(layer: nn.Module, is_first: bool) -> None:
    """What torch.compile does better: to norm in one op, and not to overwrite what belongs to others."""
    for module in layer.children():
        if type(module) is RMSNorm:
            module.__class__ = AddAndNorm
    if is_first:
        layer.register_forward_pre_hook(with_own_inputs, with_kwargs=True)


def remove_sublayer(layer: nn.Module, name: str, norms: tuple[str, ...], removed: "Removed") -> None:
    """Puts `removed` in the place of a stock layer's sublayer, and takes out its norms.

    The first norm is the one before the sublayer. Later ones would see the last bias, which is added as it is.
    """
    setattr(layer, name, removed)
    first, *later = norms
    setattr(layer, first, RemovedNorm())
    for norm in later:
        setattr(layer, norm, nn.Identity())


class Removed(nn.Module):
    """A sublayer whose units are all gone: it adds nothing but the bias of its last projection, where that has one.

    Args:
        projection: the last projection's name, which the bias keeps in the checkpoint.
    """

    def __init__(self, projection: str, hidden_size: int, has_bias: bool) -> None:
        super().__init__()
        if has_bias:
            bias = nn.Parameter(torch.empty(hidden_size), requires_grad=False)
            self.add_module(projection, nn.ParameterDict({"bias": bias}))

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Adds to the hidden states, the zeros of a `RemovedNorm`. Attention gets positions too, before or after."""
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        hidden_states = next(value for value in tensors if value.is_floating_point())
        for bias in self.parameters():
            hidden_states = hidden_states + bias
        return hidden_states


def with_own_inputs(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Hook of the first layer: copies the hidden states, which norms overwrite as the residual.

    They are the caller's: EAGLE-3 may keep them as an auxiliary hidden state.
    """
    return tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
