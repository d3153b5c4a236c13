"""The shapes that layers are written in: what the masks leave, padded with zeros where that was asked for.

Padding keeps the output exact and costs bytes. It buys even query groups (which any reader of `per_layer_config`
understands), FFN widths that suit the hardware, and few distinct layer shapes, which mean few compiled graphs.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.layer import LayerGeometry


def with_even_groups(layer: LayerGeometry) -> LayerGeometry:
    """Every query group as wide as the layer's widest."""
    return replace(layer, query_heads_per_kv_head=(layer.widest_group,) * layer.num_key_value_heads)


def with_aligned_width(layer: LayerGeometry, alignment: int, widest: LayerGeometry) -> LayerGeometry:
    """The FFN width, and the one that all experts have, rounded up to a multiple of `alignment`, but to no more than
    `widest` has. What has no channels gets none. Experts of different widths stay as they are."""

    def aligned(width: int, most: int) -> int:
        return min(-(-width // alignment) * alignment, most)

    experts = layer.expert_intermediate_sizes
    if layer.expert_width:
        experts = (aligned(layer.expert_width, widest.expert_width),) * len(experts)
    width = aligned(layer.intermediate_size, widest.intermediate_size)
    return replace(layer, intermediate_size=width, expert_intermediate_sizes=experts)


def fits(layer: LayerGeometry, shape: LayerGeometry) -> bool:
    """Whether zero-padding and reordering KV heads can make `layer` into `shape`.

    A sublayer that is gone stays gone. Uneven groups take no padding: only the same groups, in any order, fit.
    """
    if _kind(layer) != _kind(shape) or layer.intermediate_size > shape.intermediate_size:
        return False
    if shape.has_even_groups:
        return layer.num_key_value_heads <= shape.num_key_value_heads and layer.widest_group <= shape.widest_group
    return _sorted_groups(layer) == _sorted_groups(shape)


def with_few_shapes(
    layers: Sequence[LayerGeometry], cost: Callable[[LayerGeometry], int], limit: int
) -> list[LayerGeometry]:
    """Pads layers until at most `limit` distinct shapes are left, at the lowest possible total cost.

    Args:
        layers: what is to be written; every size is the smallest that is allowed.
        cost: bytes of a layer; must grow with the number of KV heads, with that of query heads and with the width.

    Returns:
        the shape of each layer. No size exceeds the largest of `layers`.

    Raises:
        InputError: `limit` is less than the number of different sets of missing sublayers.
    """
    kinds = {_kind(layer): None for layer in layers}
    if limit < len(kinds):
        raise InputError(
            f"{limit} distinct layer shapes are too few: the masks leave {len(kinds)} kinds of layers "
            f"({', '.join(kinds)}), and padding makes none into another; the smallest number that works is {len(kinds)}"
        )
    if len(set(layers)) <= limit:
        return list(layers)
    from converter.cover import cheapest_cover  # SciPy loads slowly, and few conversions need it

    # The same groups in another order are the same shape: all get the order that comes first.
    order = {_sorted_groups(layer): layer.query_heads_per_kv_head for layer in reversed(layers)}
    ordered = [replace(layer, query_heads_per_kv_head=order[_sorted_groups(layer)]) for layer in layers]
    distinct = list(dict.fromkeys(ordered))
    candidates = _candidates(distinct)
    choice = cheapest_cover(
        np.array([[layer in inside for layer in distinct] for inside in candidates.values()]),
        [cost(shape) for shape in candidates],
        [ordered.count(layer) for layer in distinct],
        limit,
    )
    shapes = list(candidates)
    chosen = {layer: shapes[index] for layer, index in zip(distinct, choice, strict=True)}
    return [chosen[layer] for layer in ordered]


def _candidates(layers: Sequence[LayerGeometry]) -> dict[LayerGeometry, set[LayerGeometry]]:
    """Every shape that can be the cheapest for some set of layers, with the layers that fit into it.

    `layers` are distinct, and have the same groups in the same order.
    Those are the joins: in each size as large as the largest of the layers inside, and no larger.
    """
    found: dict[LayerGeometry, set[LayerGeometry]] = {}

    def add(groups: tuple[int, ...], inside: list[LayerGeometry]) -> None:
        """Shapes of these groups, in every width that one of the layers has."""
        for width in {layer.intermediate_size for layer in inside}:
            shape = replace(inside[0], query_heads_per_kv_head=groups, intermediate_size=width)
            narrow = {layer for layer in inside if layer.intermediate_size <= width}
            if not shape.has_even_groups or _join(narrow) == shape:
                found[shape] = narrow

    for kind in dict.fromkeys(map(_kind, layers)):
        alike = [layer for layer in layers if _kind(layer) == kind]
        for num_key_value_heads in {layer.num_key_value_heads for layer in alike}:
            for group in {layer.widest_group for layer in alike}:
                width = max(layer.intermediate_size for layer in alike)
                groups = (group,) * num_key_value_heads
                even = replace(alike[0], query_heads_per_kv_head=groups, intermediate_size=width)
                add(even.query_heads_per_kv_head, [layer for layer in alike if fits(layer, even)])
        for groups in dict.fromkeys(layer.query_heads_per_kv_head for layer in alike if not layer.has_even_groups):
            add(groups, [layer for layer in alike if layer.query_heads_per_kv_head == groups])
    return found


def _join(layers: set[LayerGeometry]) -> LayerGeometry | None:
    """The smallest shape with even groups that all layers, which are of one kind, fit into; None of none."""
    if not layers:
        return None
    groups = (max(layer.widest_group for layer in layers),) * max(layer.num_key_value_heads for layer in layers)
    width = max(layer.intermediate_size for layer in layers)
    return replace(next(iter(layers)), query_heads_per_kv_head=groups, intermediate_size=width)


def _kind(layer: LayerGeometry) -> str:
    """What no padding changes."""
    found = ["linear attention"] * layer.linear_attention + [f"no {sublayer}" for sublayer in layer.skip]
    return " and ".join(found) or "complete"


def _sorted_groups(layer: LayerGeometry) -> tuple[int, ...]:
    return tuple(sorted(layer.query_heads_per_kv_head, reverse=True))
