"""Decoder layers of Transformers at their real size: uneven query groups, experts of different widths, parts skipped.

`build_layer` makes a stock layer and replaces in it what the stock code cannot say.
"""

from collections.abc import Mapping
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicLayer, QuantizedLayer

from pruned_vllm.formats.experts import ExpertsFormat
from pruned_vllm.formats.geometry import ModelGeometry


def build_layer(layer_class: type[nn.Module], config: PreTrainedConfig, geometry: ModelGeometry, index: int):
    """A stock decoder layer at the size of layer `index`."""
    layer: Any = layer_class(_layer_config(config, geometry, index), index)
    # A layer's config is a copy. At run time attention looks up the implementation, which the user may change.
    has_linear_attention = geometry.layers[index].linear_attention
    for sublayer in (layer.mlp,) if has_linear_attention else (layer.mlp, layer.self_attn):
        sublayer.config = config
    groups = geometry.layers[index].query_heads_per_kv_head
    _unfuse(layer, config, geometry, index)
    if not groups and not has_linear_attention:
        _remove_norms(layer, geometry.family.attention_norms)
        layer.self_attn = _SkippedAttention(index, geometry.hidden_size, geometry.o_bias)
    elif not geometry.layers[index].has_even_groups:
        layer.self_attn.num_key_value_groups = 1
        layer.self_attn.register_forward_pre_hook(partial(_repeat_kv_heads, groups), with_kwargs=True)
    if geometry.layers[index].expert_intermediate_sizes:
        layer.mlp.experts = _RaggedExperts(geometry, index, config.hidden_act)
        _fit_shared_experts(layer.mlp, geometry, index)
    elif not geometry.layers[index].intermediate_size:
        _remove_norms(layer, geometry.family.mlp_norms)
        layer.mlp = _SkippedSublayer("down_proj", geometry.hidden_size, geometry.mlp_bias)
    return layer


def _layer_config(config: PreTrainedConfig, geometry: ModelGeometry, index: int) -> PreTrainedConfig:
    """The config of one layer, with its number of experts under every name that a stock router may look for."""
    layer_config = copy(config.per_layer_config[index])
    if widths := geometry.layers[index].expert_intermediate_sizes:
        names = geometry.family.experts_format
        for key in names.count_keys:
            setattr(layer_config, key, len(widths))
        if names.shared_count_key is not None:  # the shared MLP, which stays, is as wide as so many experts were
            setattr(layer_config, names.width_key, geometry.dense_experts.intermediate_size)
    return layer_config


def _fit_shared_experts(mlp: nn.Module, geometry: ModelGeometry, index: int) -> None:
    """Gives the MLP that every token passes besides the routed experts the width that it has in this layer."""
    module, width = geometry.family.experts_format.shared_module, geometry.layers[index].intermediate_size
    if module is None or width == geometry.dense_experts.shared_intermediate_size:
        return
    name, hidden_size = module.removeprefix("mlp."), geometry.hidden_size
    if not width:
        setattr(mlp, name, _SkippedSublayer("down_proj", hidden_size, has_bias=False))
        return
    shared = getattr(mlp, name)
    for projection in ("gate_proj", "up_proj"):
        setattr(shared, projection, nn.Linear(hidden_size, width, bias=False))
    shared.down_proj = nn.Linear(width, hidden_size, bias=False)


def _remove_norms(layer: nn.Module, norms: tuple[str, ...]) -> None:
    for norm in norms:
        setattr(layer, norm, nn.Identity())


def _unfuse(layer: Any, config: PreTrainedConfig, geometry: ModelGeometry, index: int) -> None:
    """Puts one linear layer for each projection, as the files have them, in the place of a fused one."""
    shapes = geometry.layer_tensor_shapes(index)
    for fused, parts in geometry.family.fused:
        path, _, name = fused.rpartition(".")
        sublayer, names = layer.get_submodule(path), [part.rpartition(".")[2] for part in parts]
        weights = [f"model.layers.{index}.{part}.weight" for part in parts]
        if not set(weights) <= shapes.keys():  # the sublayer is skipped
            continue
        delattr(sublayer, name)
        for part, weight in zip(names, weights, strict=True):
            rows, columns = shapes[weight]
            sublayer.add_module(part, nn.Linear(columns, rows, bias=False))
        setattr(sublayer, name, _SideBySide(sublayer, names))
    if geometry.family.fused:  # attention finds q, k and v in the output of the fused projection by its config
        layer.self_attn.config = _OwnHeads(config, geometry.layers[index].num_attention_heads)


class _SideBySide:
    """What a stock sublayer calls for its fused projection: the outputs of the sublayer's projections, joined.

    No module: the sublayer has the projections, under their names on disk.
    """

    def __init__(self, sublayer: nn.Module, names: list[str]) -> None:
        self._sublayer, self._names = sublayer, names

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.cat([getattr(self._sublayer, name)(hidden_states) for name in self._names], dim=-1)


class _OwnHeads:
    """The config of the model, at run time too, but with one layer's number of query heads."""

    def __init__(self, config: PreTrainedConfig, num_attention_heads: int) -> None:
        self._config, self.num_attention_heads = config, num_attention_heads

    def __getattr__(self, name: str) -> Any:
        if name == "_config" or name.startswith("__"):  # copies and pickles ask before there is anything
            raise AttributeError(name)
        return getattr(self._config, name)


class _RaggedExperts(nn.ModuleList):
    """In place of the stock experts, which are all of one width; takes what the stock router returns."""

    def __init__(self, geometry: ModelGeometry, index: int, activation: str) -> None:
        layer, names = geometry.layers[index], geometry.family.experts_format
        super().__init__(
            _ConstantExpert(names, geometry.hidden_size)
            if expert in layer.constant_experts or (names.bias and not width)
            else _Expert(names, geometry.hidden_size, width, activation)
            for expert, width in enumerate(layer.expert_intermediate_sizes)
        )

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states [tokens, hidden_size], top_k_index and top_k_weights [tokens, experts of each token]"""
        result = torch.zeros_like(hidden_states)
        for index, expert in enumerate(self):
            token, choice = torch.where(top_k_index == index)
            if expert.adds_anything and len(token):
                # A batch of one: where there is none, compressed-tensors rounds the inputs of all tokens by one scale.
                output = expert(hidden_states[token][None])[0] * top_k_weights[token, choice, None]
                result.index_add_(0, token, output.to(result.dtype))
        return result


class _Expert(nn.Module):
    """A gated MLP with the projections' names on disk; without channels it has no parameters and is never called."""

    def __init__(self, names: ExpertsFormat, hidden_size: int, width: int, activation: str) -> None:
        super().__init__()
        self.adds_anything = width > 0
        self._names, self._is_clamped = names.projections, names.activation == "swigluoai"
        gate, up, down = self._names
        if width:
            self.add_module(gate, nn.Linear(hidden_size, width, bias=names.bias))
            self.add_module(up, nn.Linear(hidden_size, width, bias=names.bias))
            self.add_module(down, nn.Linear(width, hidden_size, bias=names.bias))
        self.activation = ACT2FN[activation]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate, up, down = (getattr(self, name) for name in self._names)
        if self._is_clamped:
            return down(_clamped_product(gate(hidden_states), up(hidden_states)))
        return down(self.activation(gate(hidden_states)) * up(hidden_states))


def _clamped_product(gate: torch.Tensor, up: torch.Tensor, alpha: float = 1.702, limit: float = 7.0) -> torch.Tensor:
    """gpt-oss' activation; pruned_vllm/formats/agreement.py refuses other constants."""
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(alpha * gate)


class _ConstantExpert(nn.Module):
    """An expert whose output is always the same: the bias of its down projection."""

    adds_anything = True

    def __init__(self, names: ExpertsFormat, hidden_size: int) -> None:
        super().__init__()
        self._down = names.projections[2]
        self.add_module(self._down, _BiasOnly(hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return getattr(self, self._down)(hidden_states)


class _SkippedSublayer(nn.Module):
    """A sublayer that lost all its heads or channels: only the bias of its last projection is left, if it has one."""

    def __init__(self, projection: str, hidden_size: int, has_bias: bool) -> None:
        super().__init__()
        self.add_module(projection, _BiasOnly(hidden_size) if has_bias else None)
        self._projection = projection

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        projection = getattr(self, self._projection)
        return torch.zeros_like(hidden_states) if projection is None else projection(hidden_states)


class _BiasOnly(nn.Module):
    """A projection of nothing. PEFT refuses it as a target by name ("o_proj"); "all-linear" leaves it out."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.bias.expand_as(hidden_states)


class _SkippedAttention(_SkippedSublayer):
    """Keeps count of the tokens in the KV cache: a cache tells positions and mask sizes by its first layer."""

    def __init__(self, layer_index: int, hidden_size: int, has_bias: bool) -> None:
        super().__init__("o_proj", hidden_size, has_bias)
        self._layer_index = layer_index

    # Attention returns its weights beside the output.
    def forward(self, hidden_states: torch.Tensor, **kwargs) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        if (stored := kwargs.get(_cache_keyword(kwargs))) is not None:
            num_heads, head_dim = _placeholder_shape(stored, self._layer_index)
            batch, tokens, _ = hidden_states.shape
            placeholder = hidden_states.new_zeros(()).expand(batch, num_heads, tokens, head_dim)
            stored.update(placeholder, placeholder, self._layer_index)
        return super().forward(hidden_states), None


def _placeholder_shape(cache: Cache, index: int) -> tuple[int, int]:
    """Heads and head_dim of what layer `index`, which has nothing to store, puts into the cache to be counted.

    1 and 1, unless the cache has memory for the layer already: with `prefill_chunk_size`, a static cache allots it by
    the sizes in config.json.
    """
    layers = cache.layers
    if index < len(layers) and isinstance(layers[index], QuantizedLayer):
        layers[index] = DynamicLayer()  # quantizing needs groups of numbers; counting does not need quantizing
    keys = layers[index].keys if index < len(layers) else None
    return (1, 1) if keys is None or keys.dim() != 4 else (keys.shape[1], keys.shape[3])


class _RepeatedHeads:
    """A layer's KV cache that stores each KV head once and gives it out once for each of its query heads.

    Every stock attention updates the cache and attends to what comes back, so none of the attention functions (eager,
    SDPA, flash) has to know of groups of unequal size. Without a cache, this stands in for one and stores nothing.
    """

    def __init__(self, groups: tuple[int, ...], stored) -> None:
        self._groups, self._stored = groups, stored

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if self._stored is not None:
            key_states, value_states = self._stored.update(key_states, value_states, *args, **kwargs)
        return self._repeat(key_states), self._repeat(value_states)

    def _repeat(self, states: torch.Tensor) -> torch.Tensor:
        """[batch, KV heads, tokens, head_dim] -> [batch, query heads, tokens, head_dim]"""
        heads = zip(states.split(1, dim=1), self._groups, strict=True)
        return torch.cat([head.expand(-1, count, -1, -1) for head, count in heads], dim=1)


def _repeat_kv_heads(groups: tuple[int, ...], attention: nn.Module, args: tuple, kwargs: dict[str, Any]):
    """Forward pre-hook of an attention whose query groups differ in size."""
    keyword = _cache_keyword(kwargs)
    return args, kwargs | {keyword: _RepeatedHeads(groups, kwargs.get(keyword))}


def _cache_keyword(kwargs: Mapping[str, Any]) -> str:
    """What a decoder layer calls the KV cache that it hands to attention: `cache` since Transformers 5.24."""
    return "cache" if "cache" in kwargs else "past_key_values"
