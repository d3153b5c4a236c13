"""What the demo's comparison of speeds is cut down to, from rates that machines were measured to have."""

import re
from dataclasses import replace

import pytest

from bench.e2e_speedup import DEFAULT_CASES
from bench.scale import build_parser
from bench.speed import budget
from bench.speed.budget import Rates, choose, comparison_seconds
from pruned_vllm.formats.ideal import Case

# 10^9 weights times tokens a second. bfloat16 with AVX-512 as the demo's results have it (bench/results/cpu_demo);
# on AVX2 so that the whole comparison takes the half hour that it took there. The others are in proportion.
AVX512 = {"bfloat16": Rates(5.5, 36, 84), "float32": Rates(2.8, 15, 40)}
AVX2 = {"bfloat16": Rates(4.3, 3.5, 4), "float32": Rates(2.5, 9, 28)}
HALF_AS_FAST = {"bfloat16": Rates(2.1, 1.7, 2), "float32": Rates(1.2, 4.5, 14)}
HOPELESS = {"bfloat16": Rates(0.1, 0.1, 0.1), "float32": Rates(0.1, 0.1, 0.1)}


@pytest.mark.parametrize(
    ("rates", "seconds", "expected"),
    [
        (AVX512, 540, ("bfloat16", 16, 5)),
        (AVX512, 300, ("bfloat16", 16, 3)),
        (AVX2, 3600, ("float32", 16, 5)),
        (AVX2, 660, ("float32", 16, 4)),
        (AVX2, 540, ("float32", 16, 3)),
        (HALF_AS_FAST, 540, ("float32", 4, 5)),
        (HOPELESS, 540, ("bfloat16", 4, 3)),
    ],
    ids=["fast", "fast, little time", "slow, much time", "slow", "slow, less time", "slower", "hopeless"],
)
def test_choice(rates, seconds, expected):
    choice = choose(rates, seconds, repeats=5, kept=0.5)
    assert (choice.dtype, choice.num_hidden_layers, choice.repeats) == expected
    assert choice.seconds <= seconds or expected == ("bfloat16", 4, 3)
    assert choice.seconds == comparison_seconds(rates[choice.dtype], *expected[1:], 0.5)


@pytest.mark.parametrize("rates", [AVX512, AVX2, HALF_AS_FAST])
def test_what_is_chosen_is_the_most_that_fits(rates):
    """Neither one repeat more nor the next size."""
    for seconds in range(200, 2000, 20):
        choice = choose(rates, seconds, repeats=5, kept=0.5)
        larger = [layers for layers in budget.LAYERS if layers > choice.num_hidden_layers]
        if larger:
            assert comparison_seconds(rates[choice.dtype], larger[-1], budget.LEAST_REPEATS, 0.5) > seconds
        if choice.repeats < 5:
            more = comparison_seconds(rates[choice.dtype], choice.num_hidden_layers, choice.repeats + 1, 0.5)
            assert more > seconds


def test_bfloat16_stays_unless_float32_is_clearly_faster():
    rates = {"bfloat16": Rates(2, 2, 2)}
    for factor, dtype in ((1.15, "bfloat16"), (1.6, "float32")):
        faster = Rates(*(factor * value for value in (2, 2, 2)))
        assert choose(rates | {"float32": faster}, 1e9, 5, 0.5).dtype == dtype


def test_no_more_repeats_than_were_asked_for():
    assert choose(AVX512, 1e9, repeats=2, kept=0.5).repeats == 2
    assert choose(HOPELESS, 1, repeats=1, kept=0.5).repeats == 1


def test_the_reason_says_what_was_chosen():
    choice = choose(AVX2, 540, repeats=5, kept=0.5)
    assert f"float32, 16 layers, 3 repeats, about {choice.seconds / 60:.0f} min." in choice.reason
    assert re.search(r"about \d+ min in bfloat16 and \d+ min in float32", choice.reason)


@pytest.mark.parametrize("field", ["one", "eight", "many"])
def test_faster_products_take_less_time(field):
    faster = replace(AVX2["float32"], **{field: 2 * getattr(AVX2["float32"], field)})
    assert comparison_seconds(faster, 16, 5, 0.5) < comparison_seconds(AVX2["float32"], 16, 5, 0.5)


def test_the_estimate_is_of_the_cases_and_the_shape_that_are_run():
    """Where bench.scale or the cases change, the constants must."""
    cases = [Case.parse(text) for text in budget.CASES]
    assert set(budget.CASES) <= set(DEFAULT_CASES)
    assert [(case.kind, case.batch_size, case.input_len) for case in cases] == [
        ("decode", 1, budget.PROMPT),
        ("decode", 8, budget.PROMPT),
        ("prefill", 1, budget.PREFILL_TOKENS),
    ]
    assert {case.output_len - 1 for case in cases if case.kind == "decode"} == {budget.STEPS}
    defaults = build_parser().parse_args(["small", "scaled"])
    assert defaults.vocab_size == budget.VOCAB_SIZE


def test_every_product_is_measured(monkeypatch):
    """On small matrices, for the sake of time."""
    for name, value in {"HIDDEN_SIZE": 16, "INTERMEDIATE_SIZE": 32, "PROBE_MATRICES": 2}.items():
        monkeypatch.setattr(budget, name, value)
    rates = budget.measure()
    assert list(rates) == ["bfloat16", "float32"]
    assert all(value > 0 for found in rates.values() for value in (found.one, found.eight, found.many))
