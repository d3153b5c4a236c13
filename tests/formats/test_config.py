"""config.json of a converted model says all sizes, also those that the dense one leaves to defaults."""

from dataclasses import replace

import pytest

from pruned_vllm.formats.config import converted_config
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.layer import LayerGeometry

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 96,
    "vocab_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "intermediate_size": 100,
}


@pytest.mark.parametrize("groups", [((1, 1), (1, 1, 1)), ((1, 1), (1, 1))], ids=["ragged", "stock"])
def test_head_dim_and_kv_heads_are_written(groups):
    """Readers would derive them from the number of query heads, which is another one now."""
    dense = ModelGeometry.from_config(LLAMA)
    pruned = dense.with_layers(tuple(LayerGeometry(group, 50) for group in groups))
    written = converted_config(pruned, LLAMA)
    assert written["head_dim"] == 16
    assert written["num_key_value_heads"] == (6 if "per_layer_config" in written else 2)
    assert ModelGeometry.from_config(written).layers == pruned.layers


@pytest.mark.parametrize("hidden_size", [60, 61])
@pytest.mark.parametrize("groups", [((1, 1), (1, 1, 1)), ((1, 1, 1), (1, 1, 1))], ids=["ragged", "uniform"])
def test_another_hidden_size_is_written(groups, hidden_size):
    """Under the stock name where the stock class takes it: three heads divide 60."""
    dense = ModelGeometry.from_config(LLAMA | {"tie_word_embeddings": True})
    layers = tuple(LayerGeometry(group, 50) for group in groups)
    pruned = replace(dense, layers=layers, hidden_size=hidden_size, tie_word_embeddings=False)
    written = converted_config(pruned, LLAMA | {"tie_word_embeddings": True})
    assert written["hidden_size"] == hidden_size and written["tie_word_embeddings"] is False
    assert ("per_layer_config" in written) == (groups[0] != groups[1] or hidden_size == 61)
    read = ModelGeometry.from_config(written)
    assert (read.layers, read.hidden_size, read.head_dim) == (layers, hidden_size, 16)
