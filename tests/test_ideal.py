"""Ideal speedups, against counts written out by hand."""

import pytest

from bench.ideal import Case, decode_step_bytes, ideal_speedup, prefill_flops
from pruned_vllm.geometry import ModelGeometry

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "vocab_size": 1000,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 100,
}
DENSE = ModelGeometry.from_config(CONFIG)
PRUNED = ModelGeometry.from_config(
    CONFIG | {"per_layer_config": {"1": {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 10}}}
)


def test_decode_counts_bytes_of_weights_and_cache():
    case = Case.parse("decode:8:32:64")
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 100 + 2 * 64
    cache = 8 * (32 + 32) * 2 * 2 * 2 * 16 * 2
    assert decode_step_bytes(DENSE, case, 2) == (2 * layer + 64 + 64000 + 8 * 64) * 2 + cache


def test_prefill_counts_multiplications():
    case = Case.parse("prefill:3:10")
    weights = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 100)
    attention = 4 * 2 * 4 * 16 * 55  # 55 pairs of a query and a key that it sees
    assert prefill_flops(DENSE, case) == 3 * (2 * weights * 10 + attention + 2 * 64000)


@pytest.mark.parametrize("text", ["decode:1:32:64", "prefill:4:512"])
def test_a_model_is_as_fast_as_itself_and_slower_than_a_smaller_one(text):
    case = Case.parse(text)
    assert case.name == text
    assert ideal_speedup(DENSE, DENSE, case, 2) == 1
    assert 1 < ideal_speedup(DENSE, PRUNED, case, 2) < 2


@pytest.mark.parametrize(
    "text", ["decode:1:32", "prefill:1:32:64", "train:1:2", "decode:0:1:2", "decode:1:1:1", "decode:x:1:2"]
)
def test_bad_cases_are_refused(text):
    with pytest.raises(ValueError, match=text):
        Case.parse(text)
