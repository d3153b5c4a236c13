"""What is measured of the machine: which products, over which buffer; rates are figures, their size is not tested."""

import pytest
import torch

from bench.speed import machine
from bench.speed.machine import (
    bandwidths,
    buffer_bytes,
    fastest,
    gemm_rate,
    last_level_cache,
    linears,
    matmul_shapes,
    measure_machine,
)
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.ideal import Case

CPU = torch.device("cpu")
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "vocab_size": 1000,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 100,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "mlp_only_layers": [0],
}
EXPERTS = ModelGeometry.from_config(CONFIG | {"per_layer_config": {"1": {"moe_intermediate_size": 24}}})


def test_products_are_those_of_the_dense_model_when_prompts_run():
    """Heads, MLP and router with all tokens, an expert with its share of them; decode cases add none."""
    cases = [Case.parse(text) for text in ("prefill:2:40", "decode:8:32:64")]
    widths = {(64, 64), (64, 32), (64, 100), (100, 64), (64, 8)}
    experts = {(20, 64, 40), (20, 40, 64)}
    assert set(matmul_shapes(EXPERTS, cases)) == {(80, *width) for width in widths} | experts


def test_without_a_prefill_products_have_a_usual_length():
    tokens = {shape[0] for shape in matmul_shapes(EXPERTS, [Case.parse("decode:8:32:64")])}
    assert tokens == {machine.DEFAULT_TOKENS, machine.DEFAULT_TOKENS // 4}


def test_the_buffer_is_far_larger_than_the_last_level_cache(monkeypatch):
    for cache, least in ((2**20, machine.SMALLEST_BUFFER), (100 * 2**20, 800 * 2**20), (2**30, machine.LARGEST_BUFFER)):
        monkeypatch.setattr(machine, "last_level_cache", lambda cache=cache: cache)
        assert least * 0.99 < buffer_bytes(CPU) <= least


def test_the_last_level_cache_is_the_largest(tmp_path):
    for index, size in enumerate(("48K", "1024K", "32M")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert last_level_cache(tmp_path) == 32 * 2**20
    assert last_level_cache(tmp_path / "none") == 0


def test_the_fastest_call_counts(monkeypatch):
    clock, calls = iter([0, 10, 10, 0, 5, 10, 12, 20, 27, 99]), []  # warm-up, then the deadline, then three calls
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(clock))
    assert fastest(calls.append, CPU, "x") == 2
    assert calls == ["x"] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kernel_multiplies(dtype):
    """Torch's and the one that vLLM picks."""
    pytest.importorskip("vllm")
    x, weight = torch.randn(3, 64).to(dtype), torch.randn(32, 64).to(dtype)
    expected = x.double() @ weight.double().T
    found = dict(linears(weight))
    assert set(found) == {"torch", "vLLM"}
    for name, multiply in found.items():
        torch.testing.assert_close(multiply(x).double(), expected, rtol=0, atol=0.5 if dtype.itemsize == 2 else 1e-4)
        assert multiply(x).shape == (3, 32), name


def test_the_record_holds_the_best_of_all_ways(monkeypatch):
    monkeypatch.setattr(machine, "linears", lambda weight: [("torch", lambda x: x @ weight.T)])
    monkeypatch.setattr(machine, "SECONDS", 0)
    monkeypatch.setattr(machine, "SQUARE", {"cpu": 32})
    monkeypatch.setattr(machine, "buffer_bytes", lambda device: 2**20)
    found = measure_machine(CPU, torch.float32, [(4, 8, 16)])
    assert found["device"] == "cpu" and found["threads"] == torch.get_num_threads() and found["dtype"] == "float32"
    assert found["bandwidth_gb_per_s"] == max(way["gb_per_s"] for way in found["bandwidth"]) > 0
    assert [way["method"] for way in found["bandwidth"]] == ["sum of float32", "one row by a matrix, torch"]
    shapes = [(way["tokens"], way["in_features"], way["out_features"]) for way in found["gemm"]]
    assert shapes == [(4, 8, 16), (32, 32, 32)]
    assert found["gemm_tflop_per_s"] == max(way["tflop_per_s"] for way in found["gemm"]) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bandwidth_is_the_bytes_of_what_is_read_in_10_to_the_9_a_second(dtype, monkeypatch):
    """The whole buffer, in bytes whatever the dtype: 2**20 of them in 2 ms."""
    monkeypatch.setattr(machine, "buffer_bytes", lambda device: 2**20)
    read = []
    monkeypatch.setattr(machine, "linears", lambda weight: read.append(weight) or [("a", None)])
    monkeypatch.setattr(machine, "fastest", lambda call, device, x: read.append(x) or 2e-3)
    rates = [rate for _, rate in bandwidths(CPU, dtype)]
    assert rates == pytest.approx([2**20 / 2e-3 / 1e9] * 2)
    summed_up, matrix, row = read
    assert summed_up.nbytes == matrix.nbytes == 2**20 and row.shape[1] == matrix.shape[1]


def test_a_product_counts_two_operations_for_each_weight_and_token(monkeypatch):
    monkeypatch.setattr(machine, "linears", lambda weight: [("a", None), ("b", None)])
    seconds = iter([4e-9, 2e-9])
    monkeypatch.setattr(machine, "fastest", lambda *arguments: next(seconds))
    assert gemm_rate((2, 3, 5), CPU, torch.float32) == pytest.approx(60 / 2e-9 / 1e12)
