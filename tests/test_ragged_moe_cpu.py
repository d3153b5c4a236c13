"""Ragged experts on CPU against float64, and their classes of width against every possible partition."""

import itertools
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruned_vllm.errors import InputError
from pruned_vllm.layers import ragged_moe_cpu
from pruned_vllm.layers.ragged_moe_cpu import RaggedExpertsCPU, aligned, width_classes

HIDDEN = 64
WIDTHS = {
    "odd": (7, 33, 96, 1, 0, 65, 31, 40),
    "one huge": (3, 1000, 5, 2, 0, 4, 1, 6),
    "multiples of 32": (32, 64, 64, 96, 32, 128, 96, 64),
    "all alike": (48,) * 8,
    "one left": (0, 0, 0, 17, 0, 0, 0, 0),
    "all empty": (0,) * 8,
    "one expert": (45,),
}
# Largest error, as a share of the largest output.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small gain nothing from threads, and lose much where other processes want the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Layer:
    """Random experts, as the packed layer and as the sum in float64 that defines it."""

    def __init__(self, widths: Sequence[int], dtype: torch.dtype = torch.float32, top_k: int = 2):
        self.offsets = [0, *itertools.accumulate(widths)]
        generator = torch.Generator().manual_seed(0)
        rows = self.offsets[-1]
        self.gate_up = (torch.randn(2, rows, HIDDEN, generator=generator) / HIDDEN**0.5).to(dtype)
        self.down = (torch.randn(rows, HIDDEN, generator=generator) / 8).to(dtype)
        self.packed = RaggedExpertsCPU(self.gate_up, self.down, self.offsets, top_k)

    def reference(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(x.shape, dtype=torch.float64)
        for expert, (start, end) in enumerate(itertools.pairwise(self.offsets)):
            gate, up = x.double() @ self.gate_up[:, start:end].double().mT
            share = (topk_weights.double() * (topk_ids == expert)).sum(1, keepdim=True)
            out += share * ((torch.nn.functional.silu(gate) * up) @ self.down[start:end].double())
        return out

    def inputs(self, tokens: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(tokens)
        num_experts = len(self.offsets) - 1
        x = torch.randn(tokens, HIDDEN, generator=generator).to(self.down.dtype)
        weights = torch.randn(tokens, top_k, generator=generator).softmax(1)
        ids = torch.rand(tokens, num_experts, generator=generator).argsort(1)[:, :top_k].to(torch.int32)
        return x, weights, ids.contiguous()

    def check(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> None:
        out = self.packed(x, topk_weights, topk_ids)
        assert (out.shape, out.dtype) == (x.shape, x.dtype)
        expected = self.reference(x, topk_weights, topk_ids)
        limit = TOLERANCE[x.dtype] * expected.abs().max().item() if expected.numel() else 0
        error = (out.double() - expected).abs().max().item() if expected.numel() else 0
        assert error <= limit, f"largest error {error:.2e}, largest output {expected.abs().max():.2e}"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_output_is_the_experts_weighted_sum(widths, dtype):
    layer = Layer(widths, dtype)
    for tokens, top_k in itertools.product((0, 1, 2, 7, 33, 70), (1, 2, 8)):
        layer.check(*layer.inputs(tokens, min(top_k, len(widths))))


@pytest.mark.parametrize("call_cost_bytes", [0, 10**9])
def test_any_number_of_classes_gives_the_same(monkeypatch, call_cost_bytes):
    monkeypatch.setattr(ragged_moe_cpu, "CALL_COST_BYTES", call_cost_bytes)
    layer = Layer(WIDTHS["odd"])
    layer.check(*layer.inputs(33, 2))


@pytest.mark.parametrize("tokens", [1, 7])
def test_ids_that_are_no_expert_are_routed_nowhere(tokens):
    layer = Layer(WIDTHS["odd"])
    x, weights, ids = layer.inputs(tokens, 4)
    for wrong in (-1, 8, 2**31 - 1, -(2**31)):
        ids[0, 1:3] = wrong
        layer.check(x, weights, ids)
    ids[:] = -1
    assert torch.equal(layer.packed(x, weights, ids), torch.zeros_like(x))


def test_inputs_need_not_be_contiguous_nor_ids_be_int32():
    layer = Layer(WIDTHS["odd"])
    x, weights, ids = layer.inputs(7, 4)
    layer.check(x.T.contiguous().T, weights.T.contiguous().T, ids.T.contiguous().T.long())


def test_same_bits_each_time():
    layer = Layer(WIDTHS["odd"], torch.bfloat16)
    inputs = layer.inputs(33, 4)
    assert torch.equal(layer.packed(*inputs), layer.packed(*inputs))


def test_keeps_nothing_of_the_original_weights():
    layer = Layer(WIDTHS["odd"])
    inputs = layer.inputs(7, 2)
    before = layer.packed(*inputs)
    layer.gate_up.zero_()
    layer.down.zero_()
    assert torch.equal(layer.packed(*inputs), before)


def test_wrong_arguments_are_all_named():
    gate_up, down = torch.zeros(2, 10, 48, dtype=torch.float64), torch.zeros(10, 48)
    with pytest.raises(InputError, match=r"(?s)hidden size 48.*offsets \[0, 7, 3\].*torch.float64"):
        RaggedExpertsCPU(gate_up, down, [0, 7, 3])
    with pytest.raises(InputError, match=r"gate_up \[2, 9, 64\] and down \[10, 64\]"):
        RaggedExpertsCPU(torch.zeros(2, 9, 64), torch.zeros(10, 64), [0, 10])


def test_a_class_too_large_for_the_op_is_refused(monkeypatch):
    monkeypatch.setattr(ragged_moe_cpu, "MAX_CLASS_ELEMENTS", 10_000)
    with pytest.raises(InputError, match="8 experts of up to 64 channels"):
        Layer(WIDTHS["all alike"])


# --- classes


def partitions(items: list[int]) -> Iterator[list[list[int]]]:
    if not items:
        yield []
        return
    for parts in partitions(items[1:]):
        yield [[items[0]], *parts]
        for index, part in enumerate(parts):
            yield [*parts[:index], [items[0], *part], *parts[index + 1 :]]


def cost(classes: list[list[int]], widths: Sequence[int], channel_bytes: int, call: int, top_k: int) -> float:
    read = sum(len(experts) * aligned(max(widths[e] for e in experts)) for experts in classes) * channel_bytes
    return min(top_k, len(widths)) / len(widths) * read + call * len(classes)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.one_of(st.integers(0, 40), st.integers(0, 400)), min_size=1, max_size=7),
    st.sampled_from([0, 1, 10_000, 40_000, 160_000, 10**9]),
    st.integers(1, 9),
)
def test_classes_cost_as_little_as_any(widths, call_cost_bytes, top_k):
    classes = width_classes(widths, HIDDEN, 2, call_cost_bytes, top_k)
    experts = [expert for expert, width in enumerate(widths) if width]
    assert sorted(expert for part in classes for expert in part) == experts
    assert all(part == sorted(part) for part in classes)
    widest = [max(widths[expert] for expert in part) for part in classes]
    assert widest == sorted(widest)
    arguments = (widths, 3 * HIDDEN * 2, call_cost_bytes, top_k)
    cheapest = min(cost(parts, *arguments) for parts in partitions(experts))
    assert cost(classes, *arguments) == pytest.approx(cheapest, rel=1e-12)


def test_padding_stays_small_where_experts_are_large():
    """128 experts evenly spread over 1 to 768 channels, as Qwen3-30B-A3B's might be."""
    widths = [6 * expert + 3 for expert in range(128)]
    classes = width_classes(widths, 2048, 2, ragged_moe_cpu.CALL_COST_BYTES)
    packed = sum(len(experts) * aligned(max(widths[e] for e in experts)) for experts in classes)
    assert packed <= 1.1 * sum(widths), f"{packed / sum(widths) - 1:.1%} padding in {len(classes)} classes"


@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_packed_bytes_are_those_of_the_classes(widths):
    layer = Layer(widths, torch.bfloat16)
    classes = width_classes(widths, HIDDEN, 2, ragged_moe_cpu.CALL_COST_BYTES, 2)
    channels = sum(len(experts) * aligned(max(widths[e] for e in experts)) for experts in classes)
    assert layer.packed.num_bytes == channels * 3 * HIDDEN * 2
