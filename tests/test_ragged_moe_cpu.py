"""The kernel for experts of different widths on CPU, and what stands in for it without a compiler, against float64."""

import logging
import random
import shutil

import pytest
import torch
from ragged_moe import CASES, DTYPES, Case, check, random_inputs

from pruned_vllm.kernels import ragged_moe_cpu
from pruned_vllm.kernels.ragged_moe_cpu import ragged_moe

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler"
)
# What passes over weights more than once, ends within a vector, or has rows that are no multiple of a cache line.
MORE_CASES = (
    Case(9, 1056, (31, 0, 64, 33), 1, "one"),
    Case(40, 2048, (70, 5), 2),
    Case(3, 33, (1, 2, 3, 4, 5, 6, 7, 8), 8),
    Case(64, 96, (100,), 1),
    Case(5, 1, (1, 1), 1, "any"),
)
TABLE = [
    pytest.param(case, dtype, id=f"{index}-{str(dtype)[6:]}")
    for index, case in enumerate(CASES + MORE_CASES)
    for dtype in DTYPES
]


@pytest.fixture
def without_a_compiler(monkeypatch):
    monkeypatch.setattr(ragged_moe_cpu, "_library", lambda: None)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize("odd", (False, True), ids=("plain", "odd"))
@pytest.mark.parametrize(("case", "dtype"), TABLE)
def test_against_float64(case, dtype, odd):
    assert ragged_moe_cpu._library() is not None, "there is a compiler, but the kernel could not be compiled"
    seed = random.SystemRandom().randrange(2**30) * 2 + odd
    problem = check(ragged_moe, case, dtype, seed, "cpu")
    assert not problem, f"{case} {dtype} seed {seed}: {problem}"


@pytest.mark.parametrize(("case", "dtype"), TABLE)
def test_matrix_products_against_float64(without_a_compiler, case, dtype):
    seed = random.SystemRandom().randrange(2**31)
    problem = check(ragged_moe, case, dtype, seed, "cpu")
    assert not problem, f"{case} {dtype} seed {seed}: {problem}"


@needs_compiler
@pytest.mark.parametrize("instructions", ((), ("-march=x86-64-v3",)), ids=("fewest", "AVX2"))
def test_instructions_of_other_processors(instructions, tmp_path, monkeypatch):
    """Vectors are of another length there."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("needs an x86-64 CPU with AVX2")
    monkeypatch.setattr(ragged_moe_cpu, "INSTRUCTIONS", dict.fromkeys(("AVX2", "AVX512"), instructions))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library = ragged_moe_cpu._library.__wrapped__()
    monkeypatch.setattr(ragged_moe_cpu, "_library", lambda: library)
    problems = [check(ragged_moe, *case.values, 3, "cpu") for case in TABLE]
    assert not any(problems), problems


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_threads_gives_the_same_bits(threads, dtype):
    inputs = random_inputs(Case(21, 1100, (70, 3, 0, 130, 41), 2), dtype, 0, "cpu")
    outputs = []
    for number in (1, 2, 3, 7):
        threads(number)
        outputs.append(ragged_moe(*inputs))
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_that_are_not_finite(dtype):
    """What overflows or is no number comes out like that; other tokens do not notice."""
    inputs = random_inputs(Case(4, 40, (9, 33), 2), dtype, 0, "cpu")
    clean = ragged_moe(*inputs)
    inputs.x[1, 3] = torch.nan
    inputs.x[2, 39] = torch.inf
    inputs.down[2, 7] = torch.inf
    out = ragged_moe(*inputs)
    assert out[1].isnan().all()
    assert not out[2].isfinite().all()
    assert not out[[0, 3], 7].isfinite().any()
    others = [column for column in range(40) if column != 7]
    assert torch.equal(out[0, others], clean[0, others]) and torch.equal(out[3, others], clean[3, others])


@needs_compiler
def test_every_float16_is_read_and_written_as_it_is():
    """Denormals, infinities and all: one channel copies its input, as silu(large) * up / large."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    values = values[~values.isnan()]
    rows = values.numel()
    x = torch.ones(1, 1, dtype=torch.float16)
    gate_up = torch.stack([torch.full((rows, 1), 64.0, dtype=torch.float16), values[:, None] / 64])
    exact = (values / 64).float() * 64  # silu(64) is 64 in float32
    down = torch.ones(rows, 1, dtype=torch.float16)
    ids = torch.arange(rows)[None].to(torch.int32)
    out = torch.cat(
        [
            ragged_moe(x, gate_up, down, torch.arange(rows + 1), torch.ones(1, 1), ids[:, [row]], 1)
            for row in range(0, rows, 97)
        ]
    )
    assert torch.equal(out.flatten().float(), exact[::97].half().float())


def test_without_a_compiler_a_warning_says_so(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    assert ragged_moe_cpu._library.__wrapped__() is None
    assert "Install a C++ compiler with OpenMP" in caplog.text and "no-such-compiler" in caplog.text
    assert not list((tmp_path / "pruned-vllm" / "kernels").iterdir())


@needs_compiler
def test_what_the_compiler_says_is_shown(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(ragged_moe_cpu, "FLAGS", ("-fno-such-flag",))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    assert ragged_moe_cpu._library.__wrapped__() is None
    assert "-fno-such-flag" in caplog.text
    assert not list((tmp_path / "pruned-vllm" / "kernels").iterdir())
