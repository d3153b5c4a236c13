"""The Triton kernels for quantized experts of different widths: interpreted, and natively where there is a GPU."""

import random

import pytest
import torch
from helpers.quantized_moe import (
    KINDS,
    LONG_GROUPS,
    check_quantized_input,
    check_quantized_triton,
    quantize_rows_problem,
)
from helpers.ragged_moe import CASES, DTYPES, Case, Types, compile_config

from pruned_vllm.kernels.ragged_moe_config import QUANTIZED_INPUT_ABOVE, choose_config, configs

FP8 = torch.float8_e4m3fn
# Each kind with every second case, each with one dtype. Interpreting a case takes a quarter of a second.
TABLE = [
    pytest.param(case, kind, DTYPES[(index + place // 2) % 3], id=f"{index}-{kind}")
    for index, case in enumerate(CASES)
    for place, kind in enumerate(KINDS)
    if kind.takes(case) and (index + place) % 2 == 0
]
LARGE = [case for case in CASES if case.tokens * case.topk / len(case.widths) > QUANTIZED_INPUT_ABOVE]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_the_table_is_large_and_has_all_kinds_with_all_dtypes():
    assert len(TABLE) >= 40
    assert {(kind, dtype) for _, kind, dtype in (case.values for case in TABLE)} == {
        (k, d) for k in KINDS for d in DTYPES
    }
    reached = {choose_config(case.tokens * case.topk / len(case.widths), FP8) for case in LARGE}
    assert reached == set(configs(FP8))


@pytest.mark.parametrize(("case", "kind", "dtype"), TABLE)
def test_against_float64(interpreter, case, kind, dtype):
    seed = random.SystemRandom().randrange(2**31)
    problem = interpreter(check_quantized_triton, case, dtype, kind, seed, "cpu")
    assert not problem, f"{case} {dtype} seed {seed}: {problem}"


@pytest.mark.parametrize("kind", LONG_GROUPS, ids=lambda kind: f"{kind}-{kind.group_size}")
def test_groups_of_several_steps(interpreter, kind):
    """A step of the largest batches has 64 terms."""
    for case in (Case(2, 600, (200, 3), 1), Case(140, 300, (150, 7), 1)):
        seed = random.SystemRandom().randrange(2**31)
        problem = interpreter(check_quantized_triton, case, torch.bfloat16, kind, seed, "cpu")
        assert not problem, f"{case} seed {seed}: {problem}"


@pytest.mark.parametrize("group_size", (None, 32))
@pytest.mark.parametrize(("case", "dtype"), [(case, DTYPES[index % 3]) for index, case in enumerate(LARGE)])
def test_quantized_inputs_of_large_batches(interpreter, case, dtype, group_size):
    seed = random.SystemRandom().randrange(2**31)
    problem = interpreter(check_quantized_input, case, dtype, group_size, seed, "cpu")
    assert not problem, f"{case} seed {seed}: {problem}"


@pytest.mark.parametrize("shape", ((3, 1), (40, 1500)))
def test_rows_are_quantized_to_the_nearest_codes(interpreter, shape):
    problem = interpreter(quantize_rows_problem, *shape, "cpu")
    assert not problem, problem


@pytest.mark.parametrize(
    ("types", "place"),
    [
        (Types("bf16", "i8"), 0),
        (Types("bf16", "fp8e4nv"), -1),
        (Types("bf16", "u8"), -1),
        (Types("bf16", "u8", group_size=128), 0),
        (Types("bf16", "fp8e4nv", "fp8e4nv"), 0),
        (Types("bf16", "fp8e4nv", "fp8e4nv"), -1),
    ],
    ids=str,
)
def test_compiled_for_hopper(types, place, tmp_path, monkeypatch):
    """Without a GPU in sight: what decodes and what takes the largest batches fits in the shared memory of small GPUs,
    weights are copied there while the products of earlier ones are computed, and codes are multiplied as they are where
    inputs are codes."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    config = configs(FP8 if types.inputs else torch.bfloat16)[place]
    gate_up, down, *quantizing = compile_config(config, types, compute_capability=90)
    for product in (gate_up, down):
        assert product.metadata.shared <= 99 * 1024
        assert "cp.async" in product.asm["ptx"]
        assert ("f32.e4m3.e4m3" in product.asm["ptx"]) == bool(types.inputs)
    assert ["e4m3x2.f32" in kernel.asm["ptx"] for kernel in quantizing] == [True] * bool(types.inputs)


@needs_gpu
@pytest.mark.parametrize("kind", KINDS + LONG_GROUPS, ids=str)
@pytest.mark.parametrize("tokens", (1, 4, 64, 500, 2000))
def test_sizes_of_a_real_model_on_a_gpu(tokens, kind):
    seed = random.SystemRandom().randrange(2**31)
    widths = tuple(random.Random(seed).choices(range(769), k=128))
    problem = check_quantized_triton(Case(tokens, 2048, widths, 8), torch.bfloat16, kind, seed, "cuda")
    assert not problem, f"seed {seed}: {problem}"


@needs_gpu
@pytest.mark.parametrize("tokens", (500, 2000))
def test_quantized_inputs_on_a_gpu(tokens):
    seed = random.SystemRandom().randrange(2**31)
    widths = tuple(random.Random(seed).choices(range(769), k=128))
    problem = check_quantized_input(Case(tokens, 2048, widths, 8), torch.bfloat16, None, seed, "cuda")
    assert not problem, f"seed {seed}: {problem}"
