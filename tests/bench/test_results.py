"""What e2e_speedup.json holds of a case, worked out by hand."""

import pytest
from helpers.speed_results import LLAMA_CONFIG as CONFIG

from bench.speed.report import machine_table, results_table
from bench.speed.results import case_record
from bench.speed.statistics import named_warnings
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.ideal import Case, ideal_speedup, step_bytes, step_flops

DENSE = ModelGeometry.from_config(CONFIG)
PRUNED = ModelGeometry.from_config(CONFIG | {"per_layer_config": {"1": {"intermediate_size": 10}}})
GEOMETRIES = {"dense": DENSE, "pruned": PRUNED, "plugin_dense": DENSE}
DECODE, PREFILL = Case.parse("decode:2:3:5"), Case.parse("prefill:2:3")
MACHINE = {"bandwidth_gb_per_s": 20.0, "gemm_tflop_per_s": 0.2, "threads": 1, "dtype": "bfloat16"}
SAMPLES = {"dense": [4.0, 8.0, 6.0], "pruned": [2.0, 4.0, 2.0], "plugin_dense": [4.0, 8.0, 5.0]}


def record(case: Case = DECODE, machine: dict | None = MACHINE, samples: dict = SAMPLES) -> dict:
    return case_record(case, samples, GEOMETRIES, 2, machine)


def test_speedups_are_those_of_pairs_against_the_ideal():
    found, ideal = record(), ideal_speedup(DENSE, PRUNED, DECODE, 2)
    assert (found["speedup"], found["speedup_q1"], found["speedup_q3"]) == (2.0, 2.0, 2.5)
    assert (found["speedup_low"], found["speedup_high"]) == (2.0, 3.0)
    assert found["ideal_speedup"] == ideal and found["of_ideal"] == 2.0 / ideal
    assert [found[key] for key in ("name", "kind", "batch_size", "input_len", "output_len")] == [
        *("decode:2:3:5", "decode", 2, 3, 5)
    ]


def test_quantized_weights_count_as_they_are_stored():
    stored = {"model.layers.0.mlp.up_proj.weight": 1000, "model.layers.1.mlp.up_proj.weight_scale": 24}
    found = case_record(DECODE, SAMPLES, GEOMETRIES, 2, MACHINE, tensor_bytes={"pruned": stored, "dense": None})
    layers = sum(PRUNED.layer_parameters(index) for index in range(len(PRUNED.layers)))
    moved = step_bytes(PRUNED, DECODE, 2) - 2 * layers + 1024
    assert found["pruned"]["bytes_per_step"] == moved
    assert found["ideal_speedup"] == step_bytes(DENSE, DECODE, 2) / moved


def test_rounds_count_and_not_repeats():
    """Of 12 pairs from 2 rounds the interval is that of 2 rounds, for the plugin's class as well."""
    samples = {name: [*seconds, *seconds] * 2 for name, seconds in SAMPLES.items()}
    found = case_record(DECODE, samples, GEOMETRIES, 2, MACHINE, rounds=2)
    assert found["speedup_confidence"] == found["plugin_dense"]["speedup_confidence"] == 0.5
    assert case_record(DECODE, samples, GEOMETRIES, 2, MACHINE)["speedup_confidence"] == 0.95


@pytest.mark.parametrize(
    ("case", "rates", "said"),
    [
        (DECODE, (1e-9, 1.0), ""),
        (DECODE, (1.0, 1e-9), "bound by arithmetic"),
        (PREFILL, (1.0, 1e-9), ""),
        (PREFILL, (1e-9, 1.0), "bound by memory"),
    ],
)
def test_a_limit_that_the_ideal_does_not_count_is_said(case, rates, said):
    """`rates`: GB/s and TFLOP/s of a machine; the ideal of decode counts bytes, that of prefill operations."""
    machine = MACHINE | dict(zip(("bandwidth_gb_per_s", "gemm_tflop_per_s"), rates, strict=True))
    found = [warning for warning in record(case, machine)["warnings"] if warning.startswith("bound")]
    other = step_flops if case.kind == "decode" else step_bytes
    sizes = (2,) if other is step_bytes else ()
    assert bool(found) == bool(said)
    for warning in found:
        ideal = other(DENSE, case, *sizes) / other(PRUNED, case, *sizes)
        assert warning.startswith(said) and f"it is {ideal:.2f}x" in warning
    assert not any(warning.startswith("bound") for warning in record(case, None)["warnings"])


def test_what_is_not_pruning_is_said():
    plugin_dense = record()["plugin_dense"]
    assert (plugin_dense["speedup"], plugin_dense["speedup_high"]) == (1.0, 1.2)
    assert "speedup" not in record()["dense"]
    assert "plugin_dense" not in record(samples={name: SAMPLES[name] for name in ("dense", "pruned")})


@pytest.mark.parametrize(("case", "steps", "tokens"), [(DECODE, 4, 2 * 4), (PREFILL, 1, 2 * 3)])
def test_what_a_step_moves_and_computes_is_compared_with_the_machine(case, steps, tokens):
    dense = record(case)["dense"]
    assert dense["median_latency_s"] == 6.0 and dense["samples_s"] == [4.0, 8.0, 6.0]
    assert dense["throughput_tokens_per_s"] == tokens / 6  # the first token of each sequence belongs to the prefill
    assert dense["step_s"] == 6 / steps
    assert (dense["bytes_per_step"], dense["flops_per_step"]) == (step_bytes(DENSE, case, 2), step_flops(DENSE, case))
    assert dense["gb_per_s"] == pytest.approx(step_bytes(DENSE, case, 2) * steps / 6 / 1e9)
    assert dense["of_bandwidth"] == pytest.approx(dense["gb_per_s"] / 20)
    assert dense["tflop_per_s"] == pytest.approx(step_flops(DENSE, case) * steps / 6 / 1e12)
    assert dense["of_gemm_rate"] == pytest.approx(dense["tflop_per_s"] / 0.2)
    assert "of_bandwidth" not in record(case, machine=None)["dense"]


def test_noise_goes_into_the_record():
    (warning,) = record()["warnings"]
    assert warning.startswith("noisy: the interval of the speedup spans 50.0%")
    quiet = {"dense": [2.0, 2.01, 2.02, 2.01], "pruned": [1.0, 1.0, 1.01, 1.0], "plugin_dense": [2.0] * 4}
    assert record(samples=quiet)["warnings"] == []
    assert named_warnings([record()]) == [f"decode:2:3:5: {warning}"]


def test_tables_show_every_contestant():
    results = {"cases": [record(), record(PREFILL)], "machine": MACHINE, "models": GEOMETRIES}
    table = machine_table(results)
    assert list(table.columns[1].cells) == ["dense", "pruned", "plugin_dense"] * 2
    assert "20.0 GB/s" in table.title and "0.200 TFLOP/s" in table.title
    assert list(results_table(results["cases"]).columns[6].cells) == ["2.00-3.00, 75 %"] * 2
    single = record(samples={name: [1.0] for name in SAMPLES})
    assert list(results_table([single]).columns[6].cells) == [""], "one repeat gives no interval"
