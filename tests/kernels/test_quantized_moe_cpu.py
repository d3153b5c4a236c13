"""The kernel for quantized experts of different widths on CPU, and what stands in for it without a compiler."""

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from helpers.quantized_moe import (
    KINDS,
    LONG_GROUPS,
    Kind,
    Quantized,
    check_quantized,
    encode,
    numbers,
    quantized_inputs,
    with_codes,
)
from helpers.ragged_moe import CASES, DTYPES, MORE_CASES, Case, compare, few_numbers, random_inputs

from pruned_vllm.kernels import ragged_moe_cpu
from pruned_vllm.kernels.ragged_moe_arguments import Scales, run_offsets
from pruned_vllm.kernels.ragged_moe_cpu import WEIGHTS, ragged_moe

kinds = pytest.mark.parametrize("kind", KINDS + LONG_GROUPS, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(scope="module")
def compiled():
    """Sees to it that a test does not pass by what stands in for the kernel."""
    for weights in WEIGHTS.values():
        assert ragged_moe_cpu._library(weights, False) is not None, "the kernel could not be compiled; see the warning"


def problems(kind: Kind, dtype: torch.dtype, cases: Sequence[Case]) -> list[str]:
    """What is wrong with the outputs for fresh random inputs of every case, and for inputs whose outputs are exact."""
    found = []
    for case in filter(kind.takes, cases):
        seed = random.SystemRandom().randrange(2**31)
        found.append((case, seed, check_quantized(ragged_moe, case, dtype, kind, seed, "cpu")))
        found.append((case, "integers", integer_problem(case, dtype, kind)))
    return [f"{case} {kind} {dtype} {seed}: {problem}" for case, seed, problem in found if problem]


def integer_inputs(case: Case, dtype: torch.dtype, kind: Kind) -> Quantized:
    """Inputs whose products and sums are exact: gates are so large that silu changes nothing, and numbers are small.

    The largest product of gate and up is 64 * 13 * 16, of which bfloat16 keeps every digit.
    """
    inputs = random_inputs(case, dtype, 0, "cpu")
    rows, hidden = inputs.down.shape
    inputs.x[:] = torch.randint(-1, 2, inputs.x.shape)
    inputs.x[:, 0] = 1
    inputs.topk_weights[:] = 2.0 ** torch.randint(-9, -6, inputs.topk_weights.shape)
    gate, up = few_numbers(rows, hidden, 6), few_numbers(rows, hidden, 16)
    gate[:, 0] = 7
    group_size = kind.group_of(hidden)
    runs = run_offsets(inputs.offsets.tolist(), group_size)
    scales = Scales(
        gate_up=torch.tensor([64.0, 1.0])[:, None, None].repeat(1, rows, hidden // (group_size or hidden)),
        down=2.0 ** torch.randint(-2, 2, (runs[-1], hidden)),
        down_offsets=torch.tensor(runs, dtype=torch.int32),
        group_size=group_size,
    )
    codes = [encode(values, kind.codes) for values in (torch.stack([gate, up]), torch.randint(-1, 2, (rows, hidden)))]
    return with_codes(inputs, *codes, scales)


def integer_problem(case: Case, dtype: torch.dtype, kind: Kind) -> str:
    """What is wrong with the output for such inputs; a channel or column too many or too few is."""
    inputs, scales, exact = integer_inputs(case, dtype, kind)
    expected = torch.zeros(inputs.x.shape, dtype=torch.float64)
    for expert, (begin, end) in enumerate(zip(inputs.offsets[:-1], inputs.offsets[1:], strict=True)):
        gate, up, down = (weights[begin:end] for weights in (*exact.gate_up, exact.down))
        weight = (inputs.topk_weights * (inputs.topk_ids == expert)).sum(-1, keepdim=True).double()
        expected += weight * (((inputs.x.double() @ gate.T) * (inputs.x.double() @ up.T)) @ down)
    expected = expected.to(dtype).double()
    return compare(ragged_moe(*inputs, scales), expected, torch.zeros_like(expected), dtype)


@pytest.mark.usefixtures("compiled")
@kinds
@dtypes
def test_against_float64(kind, dtype):
    found = problems(kind, dtype, CASES + MORE_CASES)
    assert not found, "\n".join(found)


@kinds
@dtypes
def test_matrix_products_against_float64(monkeypatch, kind, dtype):
    monkeypatch.setattr(ragged_moe_cpu, "_library", lambda weights, is_general: None)
    found = problems(kind, dtype, CASES[::3])
    assert not found, "\n".join(found)


# Compiling takes a few seconds: in every run, each kind of codes meets one capability.
OTHERS = [
    pytest.param(capability, codes, marks=() if place == other else pytest.mark.slow)
    for place, capability in enumerate(("fewest", "AVX2", "AVX512"))
    for other, codes in enumerate(WEIGHTS)
]


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("capability", "codes"), OTHERS, ids=str)
def test_instructions_of_other_processors(capability, codes, tmp_path, monkeypatch):
    capabilities = ["fewest", *reversed(ragged_moe_cpu.INSTRUCTIONS)]
    mine = ragged_moe_cpu._capability()
    if mine not in capabilities or capabilities.index(capability) >= capabilities.index(mine):
        pytest.skip(f"needs a CPU that can more than {capability}")
    monkeypatch.setattr(ragged_moe_cpu, "_capability", lambda: capability)
    monkeypatch.setattr(ragged_moe_cpu, "FLAGS", [flag.replace("-O3", "-O1") for flag in ragged_moe_cpu.FLAGS])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library = ragged_moe_cpu._library.__wrapped__(WEIGHTS[codes], False)
    assert library is not None
    monkeypatch.setattr(ragged_moe_cpu, "_library", lambda weights, is_general: library)
    found = [
        problem
        for kind in KINDS + LONG_GROUPS
        if kind.codes == codes
        for dtype in DTYPES
        for problem in problems(kind, dtype, CASES[1::3] + MORE_CASES)
    ]
    assert not found, "\n".join(found)


@pytest.mark.usefixtures("compiled")
@kinds
@dtypes
def test_any_number_of_threads_gives_the_same_bits(threads, kind, dtype):
    case = Case(21, 1100, (70, 3, 0, 130, 41), 2)
    inputs, scales, _ = quantized_inputs(case, dtype, kind, 0, "cpu")
    outputs = []
    for number in (1, 2, 3, 7):
        threads(number)
        outputs.append(ragged_moe(*inputs, scales))
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("routing", ("router", "any", "one"))
@kinds
@dtypes
def test_other_tokens_do_not_change_the_bits_of_one(kind, dtype, routing):
    """Few tokens of an expert take another path than many; a token may choose an expert twice."""
    case = Case(60, 1100, (270, 300, 0, 130, 41), 2, routing)
    inputs, scales, _ = quantized_inputs(case, dtype, kind, 0, "cpu")
    together = ragged_moe(*inputs, scales)
    for start, end in ((0, 1), (1, 3), (3, 10), (10, 60)):
        names = ("x", "topk_weights", "topk_ids")
        apart = inputs._replace(**{name: getattr(inputs, name)[start:end] for name in names})
        assert torch.equal(ragged_moe(*apart, scales), together[start:end]), f"tokens {start} to {end}"


def every_code(codes: torch.dtype) -> torch.Tensor:
    """A row that has every code, and the numbers that they are."""
    return torch.arange(256).to(torch.uint8).view(codes)[None]


def ones(shape: tuple[int, ...], codes: torch.dtype) -> torch.Tensor:
    return encode(torch.ones(shape), codes)


def single_expert(tokens: int, codes: torch.dtype, gate_up: torch.Tensor, down: torch.Tensor, up_scale: float):
    """Arguments for an expert of one channel, whose gate is 64 times the input's sum."""
    hidden = numbers(down).shape[1]
    scales = Scales(
        gate_up=torch.tensor([64.0, up_scale])[:, None, None],
        down=torch.ones(1, hidden),
        down_offsets=torch.tensor([0, 1], dtype=torch.int32),
    )
    routing = (torch.ones(tokens, 1), torch.zeros(tokens, 1, dtype=torch.int32))
    return (gate_up, down, torch.tensor([0, 1]), *routing, 1, scales)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("tokens", (1, 8))  # two ways
@pytest.mark.parametrize("codes", WEIGHTS, ids=str)
@dtypes
def test_every_code_of_down_is_the_number_it_is(dtype, codes, tokens):
    """What reaches the down projection is silu(64) / 64 = 1. NaN, which only e4m3 has, stays in its column."""
    down = every_code(codes)
    hidden = numbers(down).shape[1]
    x = torch.zeros(tokens, hidden, dtype=dtype)
    x[:, 0] = 1
    out = ragged_moe(x, *single_expert(tokens, codes, ones((2, 1, hidden), codes), down, 1 / 64))
    expected = numbers(down).to(dtype).expand(tokens, -1)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    assert expected.isnan().sum() == (2 * tokens if codes == torch.float8_e4m3fn else 0)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("at_once", (1, 8))
@pytest.mark.parametrize("codes", WEIGHTS, ids=str)
@dtypes
def test_every_code_of_up_is_the_number_it_is(dtype, codes, at_once):
    """Token t is 1 in column t alone."""
    up = every_code(codes)
    finite = numbers(up).isfinite()
    up = up.view(torch.uint8).where(finite if codes != torch.uint8 else torch.tensor(True), 0).view(codes)
    hidden = numbers(up).shape[1]
    gate_up = torch.stack([ones((1, hidden), codes).view(torch.uint8), up.view(torch.uint8)]).view(codes)
    arguments = single_expert(at_once, codes, gate_up, ones((1, hidden), codes), 1 / 64)
    out = torch.cat([ragged_moe(x, *arguments) for x in torch.eye(hidden, dtype=dtype).split(at_once)])
    torch.testing.assert_close(out, numbers(up).to(dtype).T.expand(-1, hidden), rtol=0, atol=0)


@pytest.mark.usefixtures("compiled")
@dtypes
@pytest.mark.parametrize("tokens", (1, 8))
def test_a_weight_that_is_no_number_makes_none(dtype, tokens):
    inputs, scales, _ = quantized_inputs(Case(tokens, 72, (40, 3), 2), dtype, Kind(torch.float8_e4m3fn, None), 0, "cpu")
    clean = ragged_moe(*inputs, scales)
    inputs.down.view(torch.uint8)[41, 5] = 0xFF
    out = ragged_moe(*inputs, scales)
    assert out[:, 5].isnan().all()
    others = [column for column in range(72) if column != 5]
    assert torch.equal(out[:, others], clean[:, others])
    inputs.gate_up.view(torch.uint8)[1, 2, 71] = 0x7F
    assert ragged_moe(*inputs, scales).isnan().all()


@pytest.mark.usefixtures("compiled")
def test_inputs_are_not_quantized_on_cpu():
    inputs, scales, _ = quantized_inputs(
        Case(33, 72, (40, 3), 2), torch.bfloat16, Kind(torch.float8_e4m3fn, None), 0, "cpu"
    )
    assert torch.equal(ragged_moe(*inputs, replace(scales, quantize_input=True)), ragged_moe(*inputs, scales))


@pytest.mark.parametrize(
    ("group_size", "down_offsets", "problem"),
    [
        (None, [0, 1, 1, 2, 4], "expert 3, which has 64 channels, the runs 2 to 4 of 3; .* must have 1"),
        (None, [0, 1, 2, 3, 4], "expert 1, which has 0 channels, the runs 1 to 2 of 3; .* must have 0"),
        (None, [1, 2, 2, 3, 4], "expert 3, which has 64 channels, the runs 3 to 4 of 3"),
        (None, [-1, 0, 0, 1, 2], "expert 0, which has 33 channels, the runs -1 to 0 of 3"),
        (8, [0, 4, 4, 5, 13], "expert 0, which has 33 channels, the runs 0 to 4 of 14; with group_size 8 .* 5"),
    ],
)  # fmt: skip
def test_down_offsets_that_do_not_fit_the_experts(group_size, down_offsets, problem):
    """Nothing else would notice: the kernel follows them through memory that is not the scales'."""
    inputs, scales, _ = quantized_inputs(
        Case(7, 40, (33, 0, 5, 64), 2), torch.float32, Kind(torch.int8, group_size), 0, "cpu"
    )
    wrong = replace(scales, down_offsets=torch.tensor(down_offsets, dtype=torch.int32))
    with pytest.raises(ValueError, match=f"down_offsets give {problem}"):
        ragged_moe(*inputs, wrong)


def test_scales_that_no_expert_has_are_not_read():
    """As where a rank keeps the scales of all ranks."""
    case = Case(7, 40, (33, 0, 5, 64), 2)
    inputs, scales, _ = quantized_inputs(case, torch.float32, Kind(torch.int8, 8), 0, "cpu")
    nan = scales.down.new_full((2, 40), torch.nan)
    more = replace(scales, down=torch.cat([nan, scales.down, nan]), down_offsets=scales.down_offsets + 2)
    assert torch.equal(ragged_moe(*inputs, more), ragged_moe(*inputs, scales))
