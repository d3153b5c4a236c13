"""Tensor parallelism as a pure function: nothing is lost, nothing doubled, every rank close to an even share."""

import itertools
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from vllm.model_executor.layers.vocab_parallel_embedding import (
    DEFAULT_VOCAB_PADDING_SIZE,
    VocabParallelEmbedding,
    pad_vocab_size,
)

from pruned_vllm.common.padding import PAD, head_rows, take_or_zero
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.layer import LayerGeometry
from pruned_vllm.serving.layout_changes import layout_changes
from pruned_vllm.serving.model_layout import ModelLayout, model_layout
from pruned_vllm.serving.sharding import shard_experts, shard_layer
from pruned_vllm.serving.vocabulary import is_shared_evenly, padding_size


def check(layer: LayerGeometry, ranks: int) -> None:
    groups, kv_heads = layer.query_heads_per_kv_head, layer.num_key_value_heads
    layout = shard_layer(layer, ranks)
    # Unsharded, the ranks hold every query head and channel once, each query head with its own KV head.
    starts = [sum(groups[:head]) for head in range(kv_heads)]
    read_by = {start + i: head for head, start in enumerate(starts) for i in range(groups[head])}
    held = [
        (query, head)
        for shard in layout.shards
        for head, queries in zip(shard.kv_heads, shard.query_heads, strict=True)
        for query in queries
    ]
    assert Counter(held) == Counter(read_by.items())
    assert sorted(c for shard in layout.shards for c in shard.channels) == list(range(layer.intermediate_size))
    assert sorted(query for query in layout.query_index if query != PAD) == list(range(layer.num_attention_heads))
    assert sorted(c for c in layout.channel_index if c != PAD) == list(range(layer.intermediate_size))
    assert set(layout.kv_index) - {PAD} == set(range(kv_heads))
    assert len(layout.kv_index) == ranks * layout.kv_heads and len(layout.query_index) == ranks * layout.query_heads
    # Memory of a rank: at most one KV head, one channel and one group of query heads above an even share.
    assert layout.kv_heads == -(-kv_heads // ranks)
    assert layout.channels == -(-layer.intermediate_size // ranks)
    assert layout.query_heads <= layer.num_attention_heads / ranks + layer.widest_group
    # The attention op sees each query head beside its KV head, and each result comes back to where it came from.
    for rank, shard in enumerate(layout.shards):
        projected = layout.query_index[rank * layout.query_heads : (rank + 1) * layout.query_heads]
        op_heads = [projected[position] for position in layout.op_source(rank)] if layout.is_compact else projected
        for slot, head in enumerate(shard.kv_heads):
            seen = op_heads[slot * layout.group_size :][: len(shard.query_heads[slot])]
            assert tuple(seen) == shard.query_heads[slot] and all(read_by[query] == head for query in seen)
        if layout.is_compact:
            returned = [op_heads[slot] for slot in layout.op_target(rank)]
            assert all(got == sent for got, sent in zip(returned, projected, strict=True) if sent != PAD)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 8])
def test_all_small_layers(ranks):
    for kv_heads in range(5):
        for groups in itertools.product(range(1, 5), repeat=kv_heads):
            check(LayerGeometry(groups, 7 * kv_heads), ranks)


groups = st.lists(st.integers(1, 16), max_size=40).map(tuple)


@settings(max_examples=300, deadline=None)
@given(st.builds(LayerGeometry, groups, st.integers(0, 500)), st.integers(1, 16))
def test_random_layers(layer, ranks):
    check(layer, ranks)


@pytest.mark.parametrize(
    ("groups", "ranks", "query_heads"),
    [
        ((1, 2, 3, 4, 5, 6), 2, 11),  # the largest first; by increasing size a rank would get 12
        ((1, 1, 1, 1, 5, 5), 2, 7),
        ((1, 6), 3, 3),  # more ranks than KV heads: the larger group is shared out
        ((1, 1, 8), 6, 2),
        ((2, 2, 9), 4, 5),
    ],
)
def test_query_heads_are_spread_evenly(groups, ranks, query_heads):
    assert shard_layer(LayerGeometry(groups, 64), ranks).query_heads == query_heads


@given(st.lists(st.integers(0, 40), min_size=1, max_size=20).map(tuple), st.integers(1, 8), st.sampled_from((1, 8, 32)))
def test_channels_of_experts_are_spread_evenly(widths, ranks, quantum):
    held = shard_experts(widths, ranks, quantum)
    for expert, width in enumerate(widths):
        assert [channel for rank in held for channel in rank[expert]] == list(range(width))
        assert all(rank[expert].start % quantum == 0 for rank in held if rank[expert])
    runs = [[-(-len(channels) // quantum) for channels in rank] for rank in held]
    totals = [sum(rank) for rank in runs]
    assert max(totals) - min(totals) <= 1
    for shares in zip(*runs, strict=True):
        assert max(shares) - min(shares) <= 1


@given(st.integers(0, 500), st.integers(1, 8), st.sampled_from((1, 8, 32, 96)))
def test_channels_of_a_layer_come_in_multiples(width, ranks, quantum):
    layout = shard_layer(LayerGeometry((1,) * ranks, width), ranks, quantum)
    if ranks == 1:
        assert layout.channels == width
    else:
        assert layout.channels % quantum == 0 and 0 <= layout.channels * ranks - width < ranks * quantum
    assert [channel for channel in layout.channel_index if channel != PAD] == list(range(width))


@pytest.mark.parametrize(("groups", "ranks"), [((1,) * 8, 2), ((4,) * 8, 4), ((4, 4), 4), ((8,), 8), ((3, 3), 1)])
def test_what_divides_is_laid_out_as_stock_layers_do_it(groups, ranks):
    layout = shard_layer(LayerGeometry(groups, 64 * ranks), ranks)
    assert layout.query_index == list(range(sum(groups))) and not layout.is_compact
    assert layout.channel_index == list(range(64 * ranks))
    assert layout.kv_replicas == max(1, ranks // len(groups))


def test_one_rank_keeps_the_order():
    layout = shard_layer(LayerGeometry((3, 1, 4), 51), 1)
    assert layout.query_index == list(range(8)) and layout.kv_index == [0, 1, 2]
    assert layout.is_compact and layout.group_size == 4 and layout.op_heads == 12
    assert layout.op_target(0) == [0, 1, 2, 4, 8, 9, 10, 11]


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 96,
    "vocab_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "intermediate_size": 33,
}


def test_a_config_is_read_once_for_each_number_of_ranks():
    """Target and draft model live in one process."""

    def vllm_config(ranks, **changes):
        return SimpleNamespace(
            model_config=SimpleNamespace(hf_config=LlamaConfig(**CONFIG | changes)),
            parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
        )

    layout = model_layout(vllm_config(2))
    assert layout.layers == (shard_layer(LayerGeometry((1, 1, 1), 33), 2),) * 2
    assert model_layout(vllm_config(2)) is layout
    assert model_layout(vllm_config(3)).ranks == 3
    assert model_layout(vllm_config(2, intermediate_size=34)).geometry.layers[0].intermediate_size == 34


def test_changes_of_weights_stay_on_the_cpu():
    """vLLM builds a model under the device that it will run on; the weights come from files."""
    with torch.device("meta"):
        changes = layout_changes(ModelLayout.from_geometry(ModelGeometry.from_config(CONFIG), 2))
    assert len(changes) == 24 and all(index.device.type == "cpu" for _, index, _ in changes.values())


def test_padding_is_zero():
    weight = torch.arange(1.0, 13).view(6, 2)
    taken = take_or_zero(weight, 0, head_rows([2, PAD, 0], 2))
    assert taken.tolist() == [[9, 10], [11, 12], [0, 0], [0, 0], [1, 2], [3, 4]]


@pytest.mark.parametrize("ranks", range(1, 17))
@pytest.mark.parametrize("vocab_size", [1, 64, 256, 257, 32000, 50257, 151936])
def test_ranks_share_any_vocabulary(vocab_size, ranks):
    """Every token on one rank, in order, and as many rows on each."""
    multiple = DEFAULT_VOCAB_PADDING_SIZE if is_shared_evenly(vocab_size, ranks) else padding_size(ranks)
    rows = pad_vocab_size(vocab_size, multiple)
    shards = [
        VocabParallelEmbedding._get_indices(rows, rows, vocab_size, vocab_size, rank, ranks) for rank in range(ranks)
    ]
    assert {shard.num_elements_padded for shard in shards} == {rows // ranks} and rows % ranks == 0
    ends = [0, *(shard.org_vocab_end_index for shard in shards)]
    assert [shard.org_vocab_start_index for shard in shards] == ends[:-1] and ends[-1] == vocab_size
