"""bench.scale: the large model keeps the shares of heads and channels of the small one."""

import pytest

from bench.scale import scale_model
from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.geometry import ModelGeometry

SMALL = {
    "architectures": ["PrunedLlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "vocab_size": 100,
    "num_hidden_layers": 1,
    "head_dim": 8,
    "intermediate_size": 100,
}
LARGE = {"hidden_size": 512, "vocab_size": 1000, "num_hidden_layers": 1, "head_dim": 32, "intermediate_size": 1000}


def scaled(groups: list[int], dense: tuple[int, int], large: tuple[int, int]) -> ModelGeometry:
    """`dense` and `large` are (query heads, KV heads); `groups` are what the small model keeps of its."""
    layer = {"num_attention_heads": sum(groups), "num_key_value_heads": len(groups), "intermediate_size": 50}
    heads = dict(zip(("num_attention_heads", "num_key_value_heads"), dense, strict=True))
    config = SMALL | heads | {"per_layer_config": {"0": layer | {"query_heads_per_kv_head": groups}}}
    sizes = LARGE | dict(zip(heads, large, strict=True))
    return ModelGeometry.from_config(scale_model(config, sizes)[1])


@pytest.mark.parametrize(
    "groups, dense, large, expected",
    [
        ([1, 1, 1], (6, 6), (16, 16), [1] * 8),  # each KV head has one query head
        ([4, 4, 4], (16, 4), (32, 8), [4] * 6),  # whole groups are gone
        ([2, 2, 2, 2], (16, 4), (32, 8), [2] * 8),  # half of every group: the KV cache stays as it is
        ([1, 2, 3, 4], (16, 4), (32, 8), [1, 1, 2, 2, 3, 3, 4, 4]),
        ([4, 1], (16, 4), (32, 8), [1, 2, 3, 4]),
        ([1], (16, 4), (8, 2), [1]),
        ([3, 1], (16, 4), (8, 2), [2]),
        ([8, 4], (16, 2), (16, 4), [2, 3, 3, 4]),  # groups of another size in the large model
        ([3, 3], (12, 4), (12, 4), [3, 3]),
        ([2, 1, 3, 2], (12, 4), (12, 4), [1, 2, 2, 3]),
    ],
)
def test_shares_of_kv_heads_and_of_query_heads_are_kept(groups, dense, large, expected):
    geometry = scaled(groups, dense, large)
    assert sorted(geometry.layers[0].query_heads_per_kv_head) == sorted(expected)
    assert geometry.layers[0].intermediate_size == 500


def test_the_kv_cache_shrinks_as_much_as_the_small_models():
    geometry = scaled([2, 1, 1, 2], (16, 4), (16, 4))
    assert geometry.kv_cache_bytes_per_token(2) == 2 * 4 * 32 * 2
    assert geometry.layers[0].num_attention_heads == 6


def test_skipped_attention_stays_skipped():
    config = SMALL | {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "per_layer_config": {"0": {"skip": ["attention"]}},
    }
    geometry = ModelGeometry.from_config(
        scale_model(config, LARGE | {"num_attention_heads": 16, "num_key_value_heads": 8})[1]
    )
    assert geometry.layers[0].query_heads_per_kv_head == ()


def test_groups_that_the_large_model_cannot_have_are_refused():
    with pytest.raises(InputError, match="keeps 38% of its 4 query heads.*less than one of the large model's 1; .* 4$"):
        scaled([2, 1, 1, 2], (16, 4), (16, 16))
