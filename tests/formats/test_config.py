"""config.json of a converted model says all sizes, also those that the dense one leaves to defaults."""

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
