"""Experts with biases, or with another activation than silu: both kernels, and what stands in without a compiler."""

import math
import random
from collections.abc import Iterable

import pytest
import torch
from helpers.quantized_moe import (
    KINDS,
    Kind,
    check_quantized,
    check_quantized_input,
    check_quantized_triton,
    quantized_inputs,
)
from helpers.ragged_moe import (
    BOTH,
    CASES,
    DTYPES,
    GENERAL,
    MORE_CASES,
    Case,
    Types,
    Variant,
    activated,
    check,
    check_triton,
    compile_config,
    compile_reduce,
    random_inputs,
)

from pruned_vllm.kernels import ragged_moe_cpu
from pruned_vllm.kernels.ragged_moe_arguments import SILU, Activation, Biases, check_arguments
from pruned_vllm.kernels.ragged_moe_config import configs
from pruned_vllm.kernels.ragged_moe_cpu import WEIGHTS, ragged_moe

ACTIVATIONS = tuple(dict.fromkeys(variant.activation for variant in GENERAL))
variants = pytest.mark.parametrize("variant", GENERAL, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# A variant meets every fifth case, each with one dtype, and every third kind of codes.
TRITON_TABLE = [
    pytest.param(case, DTYPES[(index + place) % 3], variant, id=f"{index}-{variant}")
    for index, case in enumerate(CASES)
    for place, variant in enumerate(GENERAL)
    if (index + place) % 5 == 0
]
TRITON_QUANTIZED = [
    pytest.param(Case(tokens, 40, (33, 0, 5, 64), 2), kind, DTYPES[place % 3], variant, id=f"{tokens}-{kind}-{variant}")
    for place, variant in enumerate(GENERAL)
    for other, kind in enumerate(KINDS)
    for tokens in ((1, 33)[(place + other) // 3 % 2],)
    if (place + other) % 3 == 0
]


@pytest.fixture(scope="module")
def compiled():
    """Sees to it that a test does not pass by what stands in for the kernel."""
    for weights in (None, *WEIGHTS.values()):
        assert ragged_moe_cpu._library(weights, True) is not None, "the kernel could not be compiled; see the warning"


@pytest.fixture
def without_a_compiler(monkeypatch):
    monkeypatch.setattr(ragged_moe_cpu, "_library", lambda weights, is_general: None)


def problems(cases: Iterable[Case], dtype: torch.dtype, variant: Variant, kind: Kind | None = None) -> str:
    """What is wrong with the outputs for fresh random inputs of every case."""
    found = []
    for case in cases:
        seed = random.SystemRandom().randrange(2**31)
        if kind is None:
            problem = check(ragged_moe, case, dtype, seed, "cpu", variant)
        else:
            problem = check_quantized(ragged_moe, case, dtype, kind, seed, "cpu", variant)
        if problem:
            found.append(f"{case} {dtype} {variant} {kind} seed {seed}: {problem}")
    return "\n".join(found)


def test_the_tables_have_all_of_what_there_is():
    for table in (TRITON_TABLE, TRITON_QUANTIZED):
        for place, kinds in ((1, DTYPES if table is TRITON_TABLE else KINDS), (-1, GENERAL)):
            assert {parameter.values[place] for parameter in table} == set(kinds)
    assert all(any(case.values[0].widths.count(0) for case in table) for table in (TRITON_TABLE, TRITON_QUANTIZED))


@pytest.mark.usefixtures("compiled")
@variants
@dtypes
def test_against_float64(dtype, variant):
    found = problems(CASES + MORE_CASES, dtype, variant)
    assert not found, found


@pytest.mark.usefixtures("compiled")
@variants
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_quantized_against_float64(kind, variant):
    """Every case with one dtype."""
    for place, dtype in enumerate(DTYPES):
        found = problems(filter(kind.takes, (CASES + MORE_CASES)[place::3]), dtype, variant, kind)
        assert not found, found


@pytest.mark.usefixtures("without_a_compiler")
@variants
@dtypes
def test_matrix_products_against_float64(dtype, variant):
    found = problems(CASES[1::2], dtype, variant) + problems(CASES[::6], dtype, variant, Kind(torch.int8, 32))
    assert not found, found


OTHERS = ["fewest", *(pytest.param(name, marks=pytest.mark.slow) for name in ("AVX2", "AVX512"))]


@pytest.mark.parametrize("capability", OTHERS)
def test_instructions_of_other_processors(capability, tmp_path, monkeypatch):
    """Outputs lie in another order there, and biases with them."""
    capabilities = ["fewest", *reversed(ragged_moe_cpu.INSTRUCTIONS)]
    mine = ragged_moe_cpu._capability()
    if mine not in capabilities or capabilities.index(capability) >= capabilities.index(mine):
        pytest.skip(f"needs a CPU that can more than {capability}")
    monkeypatch.setattr(ragged_moe_cpu, "_capability", lambda: capability)
    monkeypatch.setattr(ragged_moe_cpu, "FLAGS", [flag.replace("-O3", "-O1") for flag in ragged_moe_cpu.FLAGS])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library = ragged_moe_cpu._library.__wrapped__(None, True)
    assert library is not None
    monkeypatch.setattr(ragged_moe_cpu, "_library", lambda weights, is_general: library)
    found = [problems(CASES[1::3] + MORE_CASES, dtype, variant) for dtype in DTYPES for variant in GENERAL]
    assert not any(found), "\n".join(found)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("kind", (None, Kind(torch.int8, None), Kind(torch.uint8, 32)), ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@dtypes
def test_threads_and_other_tokens_do_not_change_the_bits(threads, dtype, activation, kind):
    """Few tokens of an expert take another path than many; a token may choose an expert twice, or one without
    channels."""
    case, scales = Case(60, 1100, (70, 3, 0, 130, 41), 2, "any"), None
    if kind is None:
        inputs = random_inputs(case, dtype, 0, "cpu")
    else:
        inputs, scales, _ = quantized_inputs(case, dtype, kind, 0, "cpu")
    more = {"scales": scales, **Variant(activation, BOTH).arguments(inputs)}
    together = ragged_moe(*inputs, **more)
    for number in (1, 3, 7):
        threads(number)
        assert torch.equal(ragged_moe(*inputs, **more), together), f"{number} threads"
    for start, end in ((0, 1), (1, 3), (3, 10), (10, 60)):
        names = ("x", "topk_weights", "topk_ids")
        apart = inputs._replace(**{name: getattr(inputs, name)[start:end] for name in names})
        assert torch.equal(ragged_moe(*apart, **more), together[start:end]), f"tokens {start} to {end}"


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_gates_and_ups_of_any_size(activation):
    """Beyond the limits, where a power overflows, and what is no number. Each pair is an expert."""
    gates = [-torch.inf, -3e38, -1e13, -1e4, -100, -88.5, -87, -20, -7, -5, -1, -0.0, 0, 1, 5, 6.9, 7.1, 88, 100, 1e13]
    ups = [-torch.inf, -1e4, -8, -1, -0.0, 0, 0.5, 6, 8, 1e4, torch.inf, torch.nan]
    pairs = torch.cartesian_prod(torch.tensor([*gates, 3e38, torch.inf, torch.nan]), torch.tensor(ups))
    ones = torch.ones(len(pairs), 1)
    inputs = (ones, pairs.T.contiguous()[..., None], ones, torch.arange(len(pairs) + 1))
    out = ragged_moe(*inputs, ones, torch.arange(len(pairs))[:, None], 1, activation=activation, biases=Biases())[:, 0]
    expected = activated(*pairs.double().T, activation)
    is_finite = expected.abs() <= torch.finfo(torch.float32).max
    torch.testing.assert_close(out[is_finite], expected[is_finite].float(), rtol=2e-5, atol=1e-7)
    assert not out[~is_finite].isfinite().any()
    assert out[pairs.isnan().any(1)].isnan().all()


@pytest.mark.usefixtures("compiled")
@dtypes
@pytest.mark.parametrize("hidden", (1, 33, 1100))
def test_an_expert_without_channels_adds_its_bias(dtype, hidden):
    """Also where no expert has any; twice where a token chose it twice, and not where it chose nobody."""
    biases = Biases(torch.empty(2, 0), torch.randn(3, hidden))
    ids = torch.tensor([[0, 2], [1, 1], [-1, 0], [3, -7]])
    weights = torch.tensor([[0.5, 0.25], [0.5, 2.0], [9.0, 1.0], [torch.nan, 4.0]])
    expected = torch.stack([
        0.5 * biases.down[0] + 0.25 * biases.down[2], 2.5 * biases.down[1], biases.down[0], torch.zeros(hidden)
    ])  # fmt: skip
    empty = (torch.empty(2, 0, hidden, dtype=dtype), torch.empty(0, hidden, dtype=dtype))
    x, offsets = torch.randn(4, hidden).to(dtype), torch.zeros(4, dtype=torch.int32)
    out = ragged_moe(x, *empty, offsets, weights, ids, 0, biases=biases)
    torch.testing.assert_close(out, expected.to(dtype))
    assert not ragged_moe(x, *empty, offsets, weights, ids, 0, biases=Biases()).any()


@pytest.mark.usefixtures("compiled")
def test_experts_with_silu_alone_need_no_other_library(monkeypatch):
    asked, library = [], ragged_moe_cpu._library

    def spy(*arguments):
        asked.append(arguments)
        return library(*arguments)

    monkeypatch.setattr(ragged_moe_cpu, "_library", spy)
    inputs = random_inputs(CASES[2], torch.float32, 0, "cpu")
    plain = ragged_moe(*inputs)
    assert torch.equal(ragged_moe(*inputs, activation=Activation("silu", 3.0, 1.0)), plain)
    with_zeros = ragged_moe(*inputs, biases=Biases(torch.zeros(2, len(inputs.down))))
    torch.testing.assert_close(with_zeros, plain, rtol=1e-5, atol=1e-5)
    assert asked == [(None, False), (None, False), (None, True)]


@pytest.mark.parametrize(("case", "dtype", "variant"), TRITON_TABLE)
def test_triton_against_float64(interpreter, case, dtype, variant):
    seed = random.SystemRandom().randrange(2**31)
    problem = interpreter(check_triton, case, dtype, seed, "cpu", variant)
    assert not problem, f"seed {seed}: {problem}"


@pytest.mark.parametrize(("case", "kind", "dtype", "variant"), TRITON_QUANTIZED)
def test_triton_quantized_against_float64(interpreter, case, kind, dtype, variant):
    seed = random.SystemRandom().randrange(2**31)
    problem = interpreter(check_quantized_triton, case, dtype, kind, seed, "cpu", variant)
    assert not problem, f"seed {seed}: {problem}"


@variants
def test_triton_with_quantized_inputs(interpreter, variant):
    seed = random.SystemRandom().randrange(2**31)
    case = Case(70, 40, (65, 0, 130), 1)
    problem = interpreter(check_quantized_input, case, torch.bfloat16, None, seed, "cpu", variant)
    assert not problem, f"seed {seed}: {problem}"


@pytest.mark.parametrize("variant", [variant for variant in GENERAL if variant.biases == BOTH], ids=str)
def test_compiled_for_hopper(variant, tmp_path, monkeypatch):
    """Without a GPU in sight: what decodes, weights being copied while the products of earlier ones are computed."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    gate_up, _ = compile_config(configs(torch.bfloat16)[0], Types("bf16"), 90, variant)
    assert gate_up.metadata.shared <= 99 * 1024
    assert "cp.async.cg.shared.global" in gate_up.asm["ptx"]


def test_sums_compiled_for_hopper(tmp_path, monkeypatch):
    """Without biases of down nothing is loaded for them."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    plain, biased = (compile_reduce("bf16", 90, has_bias).asm["ptx"].count("ld.global") for has_bias in (False, True))
    assert 0 < plain < biased


@pytest.mark.parametrize(
    ("biases", "expected"),
    [
        (Biases(torch.ones(2, 5)), ["biases.gate_up is torch.float32 [2, 5], not torch.float32 [2, 6]"]),
        (Biases(torch.ones(2, 6).bfloat16()), ["biases.gate_up is torch.bfloat16 [2, 6], not torch.float32 [2, 6]"]),
        (
            Biases(torch.ones(6), torch.ones(3, 24)),
            [
                "biases.gate_up is torch.float32 [6], not torch.float32 [2, 6]",
                "biases.down is torch.float32 [3, 24], not torch.float32 [2, 24]",
            ],
        ),
        (Biases(down=torch.ones(24, 2).T), ["biases.down is not contiguous"]),
    ],
)
def test_biases_that_do_not_fit_are_all_listed(biases, expected):
    inputs = random_inputs(Case(3, 24, (2, 4), 2), torch.bfloat16, 0, "cpu")
    check_arguments(*inputs, biases=Biases(torch.ones(2, 6), torch.ones(2, 24)))
    check_arguments(*inputs, biases=Biases())
    with pytest.raises(ValueError) as refusal:
        check_arguments(*inputs, biases=biases)
    message = str(refusal.value)
    assert [part for part in expected if part not in message] == []
    assert message.count("\n  - ") == len(expected), message


def test_biases_are_listed_beside_what_else_is_wrong():
    inputs = random_inputs(Case(3, 24, (2, 4), 2), torch.float32, 0, "cpu")
    wrong = inputs._replace(offsets=inputs.offsets[0], down=inputs.down[0, 0], x=inputs.x[0])
    with pytest.raises(ValueError) as refusal:
        check_arguments(*wrong, biases=Biases(torch.ones(2, 5), torch.ones(2, 24)))
    assert "x has shape [24]" in str(refusal.value) and "biases.gate_up is" in str(refusal.value)


def test_an_activation_that_nobody_knows():
    with pytest.raises(ValueError, match="activation is 'relu', not one of silu, gelu, gelu_tanh, swigluoai"):
        Activation("relu")
    assert Activation() == SILU and math.isclose(Activation("swigluoai").alpha, 1.702)
