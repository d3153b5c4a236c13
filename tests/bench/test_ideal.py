"""Ideal speedups, against counts written out by hand."""

import pytest
from helpers.speed_results import LLAMA_CONFIG as CONFIG

from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.ideal import Case, ideal_speedup, step_bytes, step_flops

DENSE = ModelGeometry.from_config(CONFIG)
PRUNED = ModelGeometry.from_config(
    CONFIG | {"per_layer_config": {"1": {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 10}}}
)

MOE_CONFIG = CONFIG | {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "num_experts": 4,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 30,
    "mlp_only_layers": [0],
}
MOE = ModelGeometry.from_config(MOE_CONFIG)
RAGGED = ModelGeometry.from_config(
    MOE_CONFIG | {"per_layer_config": {"1": {"expert_intermediate_sizes": [40, 0, 15, 25]}}}
)
HALF = ModelGeometry.from_config(MOE_CONFIG | {"per_layer_config": {"1": {"num_experts": 2}}})
LATENT = ModelGeometry.from_config(
    CONFIG
    | {"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "num_key_value_heads": 4}
    | {"kv_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 10, "q_lora_rank": None}
    | {"n_routed_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 40, "first_k_dense_replace": 2}
)
# Two layers of attention, one with a dense MLP, one with a router, a shared expert of 30 channels and its gate; biases
# of q, k and v and the norms are vectors.
MOE_UNROUTED = 2 * (2 * 64 * 64 + 2 * 64 * 32) + 3 * 64 * 100 + 4 * 64 + 3 * 64 * 30 + 64
MOE_VECTORS = 2 * (64 + 2 * 32 + 2 * 64)


def test_decode_counts_bytes_of_weights_and_cache():
    case = Case.parse("decode:8:32:64")
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 100 + 2 * 64
    cache = 8 * (32 + 32) * 2 * 2 * 2 * 16 * 2
    assert step_bytes(DENSE, case, 2) == (2 * layer + 64 + 64000 + 8 * 64) * 2 + cache


def test_attention_with_a_latent_vector_for_all_heads():
    """The cache holds 24 numbers, and the 8 of k that RoPE turns; a head multiplies 20 of q and k, and 10 of v."""
    weights = 2 * (4 * 20 * 64 + (24 + 8) * 64 + 4 * (12 + 10) * 24 + 64 * 4 * 10 + 3 * 64 * 100)
    vectors = 2 * (24 + 2 * 64)
    cache = 8 * (32 + 32) * 2 * (24 + 8) * 2
    assert step_bytes(LATENT, Case.parse("decode:8:32:64"), 2) == (weights + vectors + 64 + 64000 + 8 * 64) * 2 + cache
    attention = 2 * 2 * 4 * (20 + 10) * 55
    assert step_flops(LATENT, Case.parse("prefill:3:10")) == 3 * (2 * weights * 10 + attention + 2 * 64000)


def test_prefill_counts_multiplications():
    case = Case.parse("prefill:3:10")
    weights = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 100)
    attention = 4 * 2 * 4 * 16 * 55  # 55 pairs of a query and a key that it sees
    assert step_flops(DENSE, case) == 3 * (2 * weights * 10 + attention + 2 * 64000)


@pytest.mark.parametrize(("geometry", "channels"), [(MOE, 160), (RAGGED, 80)])
@pytest.mark.parametrize(("batch_size", "read"), [(1, 1 / 4), (2, 7 / 16), (3, 37 / 64)])
def test_decode_reads_the_experts_that_tokens_are_sent_to(geometry, channels, batch_size, read):
    case = Case.parse(f"decode:{batch_size}:32:64")
    cache = batch_size * (32 + 32) * 2 * 2 * 2 * 16 * 2
    weights = MOE_UNROUTED + MOE_VECTORS + read * 3 * 64 * channels + 64 + 64000 + batch_size * 64
    assert step_bytes(geometry, case, 2) == weights * 2 + cache


@pytest.mark.parametrize(("batch_size", "read"), [(1, 1 / 2), (3, 7 / 8)])
def test_decode_reads_more_of_the_experts_where_there_are_fewer(batch_size, read):
    case = Case.parse(f"decode:{batch_size}:32:64")
    cache = batch_size * (32 + 32) * 2 * 2 * 2 * 16 * 2
    router = 2 * 64  # rows that are gone
    weights = MOE_UNROUTED - router + MOE_VECTORS + read * 3 * 64 * 80 + 64 + 64000 + batch_size * 64
    assert step_bytes(HALF, case, 2) == weights * 2 + cache


@pytest.mark.parametrize(("geometry", "channels"), [(MOE, 160), (RAGGED, 80)])
def test_prefill_passes_the_chosen_experts(geometry, channels):
    weights = MOE_UNROUTED + 3 * 64 * channels // 4
    attention = 4 * 2 * 4 * 16 * 55
    assert step_flops(geometry, Case.parse("prefill:3:10")) == 3 * (2 * weights * 10 + attention + 2 * 64000)


def test_large_batches_read_all_experts():
    case = Case.parse("decode:1000:32:64")
    everything = MOE.num_layer_parameters + 64 + 64000 + 1000 * 64
    assert step_bytes(MOE, case, 2) == pytest.approx(everything * 2 + 1000 * 64 * 2 * 2 * 2 * 16 * 2)


@pytest.mark.parametrize(("dense", "pruned"), [(DENSE, PRUNED), (MOE, RAGGED)])
@pytest.mark.parametrize("text", ["decode:1:32:64", "prefill:4:512"])
def test_a_model_is_as_fast_as_itself_and_slower_than_a_smaller_one(text, dense, pruned):
    case = Case.parse(text)
    assert case.name == text
    assert ideal_speedup(dense, dense, case, 2) == 1
    assert 1 < ideal_speedup(dense, pruned, case, 2) < 2


@pytest.mark.parametrize(
    "text", ["decode:1:32", "prefill:1:32:64", "train:1:2", "decode:0:1:2", "decode:1:1:1", "decode:x:1:2"]
)
def test_bad_cases_are_refused(text):
    with pytest.raises(ValueError, match=text):
        Case.parse(text)


def test_decode_counts_multiplications():
    weights = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 100)
    attention = 4 * 2 * 4 * 16 * 64  # every head attends to 64 tokens
    assert step_flops(DENSE, Case.parse("decode:8:32:64")) == 8 * (2 * weights + attention + 2 * 64000)


def test_prefill_moves_weights_once_and_writes_the_cache():
    case = Case.parse("prefill:3:10")
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 100 + 2 * 64
    cache = 30 * 2 * 2 * 2 * 16 * 2
    assert step_bytes(DENSE, case, 2) == (2 * layer + 64 + 64000 + 30 * 64) * 2 + cache
