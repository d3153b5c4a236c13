"""The kernel for experts of different widths on CPU, and what stands in for it without a compiler, against float64."""

import logging
import random
from itertools import pairwise

import pytest
import torch
from helpers.ragged_moe import CASES, DTYPES, MORE_CASES, Case, Inputs, check, compare, few_numbers, random_inputs

from pruned_vllm.kernels import ragged_moe_cpu
from pruned_vllm.kernels.ragged_moe_cpu import RaggedMoe, ragged_moe

TABLE = [
    pytest.param(case, dtype, id=f"{index}-{str(dtype)[6:]}")
    for index, case in enumerate(CASES + MORE_CASES)
    for dtype in DTYPES
]


def integer_inputs(case: Case, dtype: torch.dtype) -> Inputs:
    """Inputs whose products and sums are exact: gates are so large that silu changes nothing, and numbers are small.

    The largest product of gate and up is 64 * 15 * 16, of which bfloat16 keeps every digit.
    """
    inputs = random_inputs(case, torch.float32, 0, "cpu")
    rows, hidden_size = inputs.down.shape
    inputs.x[:] = torch.randint(-1, 2, inputs.x.shape)
    inputs.x[:, 0] = 1
    gate, up = few_numbers(rows, hidden_size, 7), few_numbers(rows, hidden_size, 16)
    gate[:, 0] = 8
    inputs.gate_up[:] = torch.stack([64 * gate, up])
    inputs.down[:] = torch.randint(-1, 2, inputs.down.shape)
    inputs.topk_weights[:] = 2.0 ** torch.randint(-9, -6, inputs.topk_weights.shape)
    return inputs._replace(**{name: getattr(inputs, name).to(dtype) for name in ("x", "gate_up", "down")})


def integer_problem(case: Case, dtype: torch.dtype) -> str:
    """What is wrong with the output for such inputs; a channel too many or too few is."""
    inputs = integer_inputs(case, dtype)
    x, gate, up, down = (value.double() for value in (inputs.x, *inputs.gate_up, inputs.down))
    expected = torch.zeros_like(x)
    for expert, (begin, end) in enumerate(pairwise(inputs.offsets.tolist())):
        hidden = (x @ gate[begin:end].T) * (x @ up[begin:end].T)
        weight = (inputs.topk_weights * (inputs.topk_ids == expert)).sum(-1, keepdim=True)
        expected += weight.double() * (hidden @ down[begin:end])
    expected = expected.to(dtype).double()
    return compare(ragged_moe(*inputs), expected, torch.zeros_like(expected), dtype)


@pytest.fixture
def compiled():
    """Sees to it that a test does not pass by what stands in for the kernel."""
    assert ragged_moe_cpu._library(None, False) is not None, "the kernel could not be compiled; see the warning"


@pytest.fixture
def without_a_compiler(monkeypatch):
    monkeypatch.setattr(ragged_moe_cpu, "_library", lambda weights, is_general: None)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("odd", (False, True), ids=("plain", "odd"))
@pytest.mark.parametrize(("case", "dtype"), TABLE)
def test_against_float64(case, dtype, odd):
    seed = random.SystemRandom().randrange(2**30) * 2 + odd
    problem = check(ragged_moe, case, dtype, seed, "cpu")
    assert not problem, f"{case} {dtype} seed {seed}: {problem}"


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("case", "dtype"), TABLE)
def test_integers_come_out_exactly(case, dtype):
    """One wrong channel among hundreds would be within what rounding may cost elsewhere."""
    problem = integer_problem(case, dtype)
    assert not problem, problem


@pytest.mark.parametrize(("case", "dtype"), TABLE)
def test_matrix_products_against_float64(without_a_compiler, case, dtype):
    seed = random.SystemRandom().randrange(2**31)
    problem = check(ragged_moe, case, dtype, seed, "cpu")
    assert not problem, f"{case} {dtype} seed {seed}: {problem}"


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("capability", ("fewest", "AVX2", "AVX512"))
def test_instructions_of_other_processors(capability, tmp_path, monkeypatch):
    """Vectors are of another length there, or bfloat16 numbers are not multiplied as they are."""
    capabilities = ["fewest", *reversed(ragged_moe_cpu.INSTRUCTIONS)]
    mine = ragged_moe_cpu._capability()
    if mine not in capabilities or capabilities.index(capability) >= capabilities.index(mine):
        pytest.skip(f"needs a CPU that can more than {capability}")
    monkeypatch.setattr(ragged_moe_cpu, "_capability", lambda: capability)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library = ragged_moe_cpu._library.__wrapped__(None, False)
    assert library is not None
    monkeypatch.setattr(ragged_moe_cpu, "_library", lambda weights, is_general: library)
    problems = [check(ragged_moe, *case.values, 3, "cpu") for case in TABLE]
    problems += [integer_problem(*case.values) for case in TABLE]
    assert not any(problems), problems


@pytest.mark.usefixtures("compiled")
def test_other_flags_are_another_library(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(ragged_moe_cpu, "INSTRUCTIONS", {})
    for flags in (("-O1", "-shared", "-fPIC", "-std=c++17"), ("-O0", "-shared", "-fPIC", "-std=c++17")):
        monkeypatch.setattr(ragged_moe_cpu, "FLAGS", flags)
        assert ragged_moe_cpu._library.__wrapped__(None, False) is not None
    assert len(list(tmp_path.rglob("*.so"))) == 2


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_threads_gives_the_same_bits(threads, dtype):
    inputs = random_inputs(Case(21, 1100, (70, 3, 0, 130, 41), 2), dtype, 0, "cpu")
    outputs = []
    for number in (1, 2, 3, 7):
        threads(number)
        outputs.append(ragged_moe(*inputs))
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("routing", ("router", "any", "one"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_tokens_do_not_change_the_bits_of_one(dtype, routing):
    """Few tokens of an expert take another path than many; a token may choose an expert twice."""
    inputs = random_inputs(Case(90, 1100, (270, 300, 0, 130, 41), 2, routing), dtype, 0, "cpu")
    together = ragged_moe(*inputs)
    for start, end in ((0, 1), (1, 3), (3, 10), (10, 90)):
        names = ("x", "topk_weights", "topk_ids")
        apart = inputs._replace(**{name: getattr(inputs, name)[start:end] for name in names})
        assert torch.equal(ragged_moe(*apart), together[start:end]), f"tokens {start} to {end}"


@pytest.mark.usefixtures("compiled")
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


@pytest.mark.usefixtures("compiled")
def test_every_float16_is_read_and_written_as_it_is():
    """Denormals and infinities too: a weight of `down` comes out times silu(64) / 64, which is 1."""
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    values = values[~values.isnan()]
    count = len(values)
    x = torch.ones(count, 1, dtype=torch.float16)
    gate_up = torch.tensor([64, 1 / 64], dtype=torch.float16)[:, None, None].repeat(1, count, 1)
    ids = torch.arange(count)[:, None]
    out = ragged_moe(x, gate_up, values[:, None], torch.arange(count + 1), torch.ones(count, 1), ids, 1)
    assert torch.equal(out[:, 0], values)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_rounds_as_torch_does(dtype):
    """Ties, overflow and denormals: router weights are float32, and what they multiply here is 1."""
    bits = torch.randint(-(2**31), 2**31, (200_000,), dtype=torch.int64)
    ties = bits & ~0x1FFF | 0x1000 if dtype == torch.float16 else bits & ~0xFFFF | 0x8000
    weights = torch.cat([bits, ties]).to(torch.int32).view(torch.float32)
    weights = weights[((weights.abs() >= 2.0**-126) & (weights.abs() < 1e36)) | (weights == 0)]  # times 64 is finite
    count = len(weights)
    x = torch.ones(count, 1, dtype=dtype)
    gate_up, down = torch.tensor([64, 1 / 64], dtype=dtype)[:, None, None], torch.ones(1, 1, dtype=dtype)
    ids = torch.zeros(count, 1, dtype=torch.int32)
    out = ragged_moe(x, gate_up, down, torch.tensor([0, 1]), weights[:, None], ids, 1)
    assert torch.equal(out[:, 0], weights.to(dtype))


@pytest.mark.usefixtures("compiled")
def test_gates_of_any_size():
    gates = torch.tensor([-torch.inf, -3e38, -1e4, -100, -88.5, -87, -20, -1, -0.0, 0, 1, 20, 88, 100, 3e38, torch.inf])
    gate_up = torch.stack([gates[:, None], torch.full((len(gates), 1), 2.0)])
    ids = torch.arange(len(gates))[:, None]
    inputs = (torch.ones(len(gates), 1), gate_up, torch.ones(len(gates), 1), torch.arange(len(gates) + 1))
    out = ragged_moe(*inputs, torch.ones(len(gates), 1), ids, 1)
    torch.testing.assert_close(out[:, 0], 2 * torch.nn.functional.silu(gates), rtol=1e-6, atol=1e-36, equal_nan=True)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("beyond", [2**32, 2**32 + 1, -(2**32), 2**31, 2**63 - 1, -(2**63)])
def test_an_id_that_does_not_fit_into_32_bits_is_no_other_expert(beyond):
    inputs = random_inputs(Case(7, 40, (33, 0, 5, 64), 2), torch.float32, 0, "cpu")
    ids = inputs.topk_ids.long()
    ids[2, 1] = ids[4, 0] = beyond
    nobody = ids.where(ids != beyond, -1)
    assert torch.equal(ragged_moe(*inputs._replace(topk_ids=ids)), ragged_moe(*inputs._replace(topk_ids=nobody)))


@pytest.mark.usefixtures("compiled")
def test_weights_that_stay_take_any_input_that_fits():
    """Later calls ask nothing of the weights, and still everything of what comes."""
    inputs = random_inputs(Case(7, 40, (33, 0, 5, 64), 2), torch.float32, 0, "cpu")
    x, weights, ids = inputs.x, inputs.topk_weights, inputs.topk_ids
    moe = RaggedMoe(inputs.gate_up, inputs.down, inputs.offsets, inputs.max_width)
    for arguments in (
        (x, weights, ids),
        (x[:3], weights[:3], ids[:3]),
        (x[:0], weights[:0], ids[:0]),
        (x, weights.double(), ids.long()),
        (x[::2], weights[::2], ids[::2]),
        (x, weights[:, :1], ids[:, :1]),
        (x.T.contiguous().T, weights, torch.full_like(ids, 4)),
    ):
        changed = inputs._replace(**dict(zip(("x", "topk_weights", "topk_ids"), arguments, strict=True)))
        assert torch.equal(moe(*arguments), ragged_moe(*changed))
    for arguments in (
        (x.bfloat16(), weights, ids),
        (x[:, :39], weights, ids),
        (x[0], weights, ids),
        (x[:6], weights, ids),
        (x, weights[:, :1], ids),
        (x, weights[0], ids[0]),
        (x, weights.int(), ids),
        (x, weights, ids.float()),
        (x.to("meta"), weights, ids),
    ):
        with pytest.raises(ValueError, match="ragged_moe cannot use its arguments"):
            moe(*arguments)
    assert torch.equal(moe(x, weights, ids), ragged_moe(*inputs))


@pytest.mark.usefixtures("compiled")
def test_rows_that_no_expert_has_are_not_read():
    inputs = random_inputs(Case(7, 40, (33, 0, 5, 64), 2), torch.float32, 0, "cpu")
    longer = inputs._replace(
        gate_up=torch.cat([inputs.gate_up, inputs.gate_up.new_full((2, 3, 40), torch.nan)], 1),
        down=torch.cat([inputs.down, inputs.down.new_full((3, 40), torch.nan)]),
    )
    assert torch.equal(ragged_moe(*longer), ragged_moe(*inputs))


@pytest.mark.parametrize("dtype", (torch.int32, torch.int64), ids=str)
@pytest.mark.parametrize(
    ("offsets", "problem"),
    [
        ([0, 33, 33, 38, 103], "expert 3 to rows 38 to 103"),
        ([-1, 33, 33, 38, 102], "expert 0 to rows -1 to 33"),
        ([0, 33, 500, 38, 102], "expert 1 to rows 33 to 500"),
        ([0, 33, -7, 38, 102], "expert 1 to rows 33 to -7"),
        ([0, 40, 33, 38, 102], "expert 1 to rows 40 to 33"),
        ([103, 103, 103, 103, 103], "expert 0 to rows 103 to 103"),
    ],
)
def test_offsets_that_lead_outside_of_the_weights(offsets, problem, dtype):
    """Nothing else would notice: the kernel follows them through memory that is not the weights'."""
    inputs = random_inputs(Case(7, 40, (33, 0, 5, 64), 2), torch.float32, 0, "cpu")
    with pytest.raises(ValueError, match=f"offsets send {problem} of 102 rows"):
        ragged_moe(*inputs._replace(offsets=torch.tensor(offsets, dtype=dtype)))


def test_without_a_compiler_a_warning_says_so(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    assert ragged_moe_cpu._library.__wrapped__(None, False) is None
    assert "Install a C++ compiler with OpenMP" in caplog.text and "no-such-compiler" in caplog.text
    assert not list(tmp_path.rglob("ragged_moe_cpu*"))


@pytest.mark.usefixtures("compiled")
def test_what_the_compiler_says_is_shown(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(ragged_moe_cpu, "FLAGS", ("-fno-such-flag",))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    assert ragged_moe_cpu._library.__wrapped__(None, False) is None
    assert "-fno-such-flag" in caplog.text
    assert not list(tmp_path.rglob("ragged_moe_cpu*"))
