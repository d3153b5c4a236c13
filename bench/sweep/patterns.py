"""What is removed of a dense model: ragged widths that keep a share on average, and uniform ones of about that size.

Ragged is what methods with one budget for the whole model leave: every layer keeps another share of its heads and of
its channels, spread like a beta distribution around the mean (bench/speed/widths.py), in an order drawn at random.
Query heads are removed one by one, so query groups become uneven; a KV head goes when its last query head goes. Of
layers with experts only channels of experts go, every expert keeping another share, as in the DDP paper. FFN widths are
rounded up as convert-pruned does (`--align`), widths of experts that differ are not. Pure Python.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from bench.speed.widths import beta_shares, widths_of
from converter.shapes import with_aligned_width
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.layer import LayerGeometry


def ragged_layers(dense: ModelGeometry, keep: float, align: int) -> ModelGeometry:
    """`dense` with layers that keep the share `keep`, 0 < keep < 1, on average; FFN widths are multiples of `align`."""
    first = dense.dense_layers[0]
    shares = beta_shares(keep, len(dense.layers))
    heads = widths_of(shares, first.num_attention_heads, seed=1)
    channels = widths_of(shares, max(first.intermediate_size, 1), seed=2)
    experts = beta_shares(keep, dense.experts.num_experts) if dense.experts else []
    layers = []
    for index, layer in enumerate(dense.dense_layers):
        if layer.expert_intermediate_sizes:
            widths = widths_of(experts, layer.expert_width, seed=index)
            layers.append(replace(layer, expert_intermediate_sizes=widths))
        else:
            exact = LayerGeometry(_groups(layer, heads[index], seed=index), channels[index])
            layers.append(with_aligned_width(exact, align, layer))
    return dense.with_layers(tuple(layers))


def _groups(layer: LayerGeometry, num_heads: int, seed: int) -> tuple[int, ...]:
    """Query heads of each KV head that still has some when `num_heads` drawn at random stay."""
    owners = [kv_head for kv_head, group in enumerate(layer.query_heads_per_kv_head) for _ in range(group)]
    kept = Counter(random.Random(seed).sample(owners, num_heads))
    return tuple(kept[kv_head] for kv_head in sorted(kept))


def uniform_layers(dense: ModelGeometry, ragged: ModelGeometry, align: int) -> ModelGeometry:
    """`dense` with equal layers and as many parameters as `ragged`, up to half a step of `align` channels a layer.

    That is in every expert, where there are some: with 512 channels and steps of 64 up to 9 % of a model that lost
    70 %. So what compares both (`of_uniform` in bench/sweep/summary.py) divides by their ideals.
    """
    first, count = dense.dense_layers[0], len(dense.layers)
    if first.expert_intermediate_sizes:
        mean = sum(sum(layer.expert_intermediate_sizes) for layer in ragged.layers) / count
        width = _aligned(mean / len(first.expert_intermediate_sizes), align, first.expert_width)
        layer = replace(first, expert_intermediate_sizes=(width,) * len(first.expert_intermediate_sizes))
        return dense.with_layers((layer,) * count)
    narrow = replace(first, query_heads_per_kv_head=_nearest_groups(first, ragged.layers), intermediate_size=1)
    missing = ragged.num_layer_parameters - dense.with_layers((narrow,) * count).num_layer_parameters
    width = _aligned(1 + missing / (3 * dense.hidden_size * count), align, first.intermediate_size)
    return dense.with_layers((replace(narrow, intermediate_size=width),) * count)


def _nearest_groups(dense: LayerGeometry, layers: Sequence[LayerGeometry]) -> tuple[int, ...]:
    """Equal query groups with about as many query heads and KV heads as `layers` have on average."""
    heads = sum(layer.num_attention_heads for layer in layers) / len(layers)
    kv_heads = sum(layer.num_key_value_heads for layer in layers) / len(layers)
    counts = range(1, dense.num_key_value_heads + 1)
    choices = [(kv, group) for kv in counts for group in range(1, dense.widest_group + 1)]
    kv, group = min(choices, key=lambda choice: abs(choice[0] * choice[1] - heads) + abs(choice[0] - kv_heads))
    return (group,) * kv


def _aligned(width: float, align: int, full: int) -> int:
    return min(full, max(1, round(width / align)) * align)
