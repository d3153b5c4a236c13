"""Sizes that the kernels of a scheme want: what is padded for them, and what is refused. Pure Python.

FFN widths are padded with channels of zeros to what the scheme's kernels want, times the number of tensor-parallel
ranks: a channel of zeros computes nothing. Experts of different widths have kernels of our own, which take any width;
they are padded to whole groups only, where a scale is for a group. Heads and the hidden size are not padded: a layer
whose heads no kernel takes is refused.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

from converter.quantize.schemes import GROUP_SIZES, Scheme, Wanted
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.layer import LayerGeometry
from pruned_vllm.formats.quantized_tensors import expert_modules

ANY_SIZE = "fp8-dynamic and w8a8-int8 take any size"


def width_step(scheme: Scheme, group_size: int | None, ranks: int) -> int:
    """What FFN widths are padded to multiples of."""
    return math.lcm(scheme.good_multiple, group_size or 1) * ranks


def choose_group_size(wanted: Wanted, geometry: ModelGeometry, modules: frozenset[str]) -> tuple[int | None, list[str]]:
    """The group size, or problems; None is a scale for each output.

    Where the user leaves it open, it is what makes the smallest files: large groups have few scales, but experts of
    different widths are padded to whole groups.
    """
    scheme = wanted.scheme
    if not scheme.has_groups:
        refused = [f"--group-size is for w4a16; {scheme.name} has a scale for each output"] * bool(wanted.group_size)
        return None, refused
    if wanted.group_size == 0:
        return None, []
    if wanted.group_size and wanted.group_size % scheme.pack_factor:
        return None, [f"a group of {wanted.group_size} inputs does not fill int32 numbers of {scheme.pack_factor} each"]
    inputs = _fixed_inputs(wanted, geometry, modules)
    fitting = [size for size in GROUP_SIZES if not any(number % size for number in inputs.values())]
    if wanted.group_size is None and fitting:
        padded = {size: padded_sizes(wanted, size, geometry, modules) for size in fitting}
        return min(fitting, key=lambda size: _stored_bits(scheme, size, padded[size], modules)), []
    size = wanted.group_size or GROUP_SIZES[-1]
    fix = f"choose --group-size {' or '.join([*map(str, fitting), 'channel'])}"
    problems = [f"{what} is no multiple of the group size {size}; {fix}" for what in inputs if inputs[what] % size]
    return (None if problems else size), problems


def padded_sizes(
    wanted: Wanted, group_size: int | None, geometry: ModelGeometry, modules: frozenset[str]
) -> ModelGeometry:
    """The sizes that are written."""
    step = width_step(wanted.scheme, group_size, wanted.ranks)
    layers = []
    for index, layer in enumerate(geometry.layers):
        width, experts = layer.intermediate_size, layer.expert_intermediate_sizes
        mlp = f"model.layers.{index}.{geometry.family.mlp_of(layer)}"
        if _any_in(modules, (f"{mlp}.{name}_proj" for name in ("gate", "up", "down"))):
            width = _up(width, step)
        if experts and _any_in(modules, expert_modules(geometry, index)):
            experts = tuple(_up(channels, group_size or 1) for channels in experts)
            if len(set(experts)) == 1:
                experts = tuple(_up(channels, step) for channels in experts)
        layers.append(replace(layer, intermediate_size=width, expert_intermediate_sizes=experts))
    return geometry.with_layers(tuple(layers))


def size_problems(
    wanted: Wanted, group_size: int | None, geometry: ModelGeometry, modules: frozenset[str]
) -> list[str]:
    """Sizes that no padding changes and that the scheme's kernels refuse."""
    scheme, problems = wanted.scheme, []

    def check(what: str, size: int, multiple: int, fix: str) -> None:
        if size % multiple:
            problems.append(f"{what} is no multiple of {multiple}, which {scheme.name} needs; {fix}")

    other = f"choose another --scheme ({ANY_SIZE})"
    hidden = f"the hidden size {geometry.hidden_size}"
    check(hidden, geometry.hidden_size, math.lcm(scheme.needed_inputs, scheme.needed_outputs), other)
    fix = f"{other}, or leave attention as it is: --ignore 're:.*self_attn.*'"
    for index, layer in enumerate(geometry.layers if geometry.latent is None else ()):
        heads = _heads(layer, geometry, wanted.ranks)
        if f"model.layers.{index}.self_attn.o_proj" in modules:
            size = _head_inputs(layer, geometry.head_dim, wanted.ranks)
            check(f"layer {index}: o_proj, whose inputs are {heads} = {size},", size, scheme.needed_inputs, fix)
        if f"model.layers.{index}.self_attn.q_proj" in modules:
            size = _qkv_outputs(layer, geometry, wanted.ranks)
            what = f"layer {index}: q, k and v, whose outputs are {heads} and {layer.num_key_value_heads} KV heads"
            check(f"{what} = {size},", size, scheme.needed_outputs, fix)
    for what, inputs, outputs in _latent_sizes(wanted, geometry, modules):
        check(f"{what}, whose inputs are {inputs},", inputs, scheme.needed_inputs, fix)
        check(f"{what}, whose outputs are {outputs},", outputs, scheme.needed_outputs, fix)
    return problems


def _fixed_inputs(wanted: Wanted, geometry: ModelGeometry, modules: frozenset[str]) -> dict[str, int]:
    """Numbers of inputs that cannot be padded, on each rank, by what they are."""
    inputs = {f"the hidden size {geometry.hidden_size}": geometry.hidden_size}
    inputs |= {f"{what}, whose inputs are {size},": size for what, size, _ in _latent_sizes(wanted, geometry, modules)}
    for index, layer in enumerate(geometry.layers if geometry.latent is None else ()):
        if f"model.layers.{index}.self_attn.o_proj" in modules:
            size = _head_inputs(layer, geometry.head_dim, wanted.ranks)
            inputs[f"layer {index}: o_proj, whose inputs are {_heads(layer, geometry, wanted.ranks)} = {size},"] = size
    return inputs


def _latent_sizes(wanted: Wanted, geometry: ModelGeometry, modules: frozenset[str]) -> Iterator[tuple[str, int, int]]:
    """What of latent attention is quantized, with its inputs and outputs on each rank. All layers are alike."""
    if geometry.latent is None:
        return
    heads = geometry.dense_layers[0].num_attention_heads // wanted.ranks
    for module, (outputs, inputs) in geometry.latent.linear_shapes(geometry.hidden_size, heads).items():
        if any(f"model.layers.{index}.{module}" in modules for index in range(len(geometry.layers))):
            yield module.rpartition(".")[2], inputs, outputs


def _head_inputs(layer: LayerGeometry, head_dim: int, ranks: int) -> int:
    """Inputs of o_proj on each rank; one head's where ranks hold different numbers, all of which it divides."""
    if ranks == 1:
        return layer.num_attention_heads * head_dim
    even = layer.has_even_groups and layer.num_attention_heads % ranks == 0
    return layer.num_attention_heads // ranks * head_dim if even else head_dim


def _qkv_outputs(layer: LayerGeometry, geometry: ModelGeometry, ranks: int) -> int:
    """Outputs of q, k and v together on each rank; one head's where ranks hold different numbers."""
    heads, kv_heads = layer.num_attention_heads, layer.num_key_value_heads
    if ranks > 1:
        if not layer.shares_heads_evenly(ranks):
            return geometry.head_dim
        heads, kv_heads = heads // ranks, max(1, kv_heads // ranks)
    return heads * geometry.family.query_rows(geometry.head_dim) + 2 * kv_heads * geometry.head_dim


def _heads(layer: LayerGeometry, geometry: ModelGeometry, ranks: int) -> str:
    heads = f"{layer.num_attention_heads} heads of {geometry.head_dim}"
    return heads if ranks == 1 else f"{heads} on {ranks} ranks, so on one"


def _stored_bits(scheme: Scheme, group_size: int, geometry: ModelGeometry, modules: frozenset[str]) -> int:
    """Of the weights that are quantized: theirs, and 16 for each scale."""
    shapes = geometry.tensor_shapes().items()
    numbers = sum(math.prod(shape) for name, shape in shapes if name.removesuffix(".weight") in modules)
    return numbers * scheme.num_bits + numbers // group_size * 16


def _any_in(modules: frozenset[str], names: Iterable[str]) -> bool:
    return any(name in modules for name in names)


def _up(width: int, multiple: int) -> int:
    return -(-width // multiple) * multiple
