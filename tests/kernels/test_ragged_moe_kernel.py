"""The Triton kernels for experts of different widths: interpreted everywhere, natively where there is a GPU.

The interpreter runs in a process of its own: Triton reads TRITON_INTERPRET when its own functions and the kernels are
decorated, and vLLM may have imported Triton into this process before.
"""

import random

import pytest
import torch
from helpers.ragged_moe import (
    CASES,
    DTYPES,
    MANY,
    Case,
    Types,
    check_triton,
    compare,
    compare_contestants,
    compile_config,
    random_inputs,
    reference,
    schedule,
)

from pruned_vllm.kernels.ragged_moe_arguments import check_arguments
from pruned_vllm.kernels.ragged_moe_config import choose_config, configs

TABLE = [
    pytest.param(case, dtype, id=f"{index}-{str(dtype)[6:]}") for index, case in enumerate(CASES) for dtype in DTYPES
]
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)  # in CPU memory: interpreted
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_the_table_is_large_and_reaches_every_configuration():
    assert len(TABLE) >= 40
    for dtype in DTYPES:
        reached = {choose_config(c.tokens * c.topk / len(c.widths), dtype) for c in CASES if c.tokens and sum(c.widths)}
        assert reached == set(configs(dtype))


@pytest.mark.parametrize("odd", (False, True), ids=("plain", "odd"))
@pytest.mark.parametrize(("case", "dtype"), TABLE)
@pytest.mark.parametrize("device", DEVICES)
def test_against_float64(interpreter, device, case, dtype, odd):
    seed = random.SystemRandom().randrange(2**30) * 2 + odd
    problem = (
        interpreter(check_triton, case, dtype, seed, "cpu")
        if device == "cpu"
        else check_triton(case, dtype, seed, device)
    )
    assert not problem, f"{case} {dtype} seed {seed}: {problem}"


def test_the_benchmark_compares_it_with_vllm(interpreter):
    assert interpreter(compare_contestants) == ["ragged", "dense, same kernel", "dense", "widest"]


@pytest.mark.parametrize("config", configs(torch.bfloat16), ids=lambda config: f"up-to-{config.up_to}")
def test_compiled_for_hopper(config, tmp_path, monkeypatch):
    """Without a GPU in sight: every configuration fits in the shared memory of small GPUs, and all weights and inputs
    are copied there 16 bytes at a time while the products of earlier ones are computed."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for compiled in compile_config(config, Types("bf16"), compute_capability=90):
        assert compiled.metadata.shared <= 99 * 1024
        assert "cp.async.cg.shared.global" in compiled.asm["ptx"]
        assert "cp.async.ca.shared.global" not in compiled.asm["ptx"]  # copies of 4 or 8 bytes


@pytest.mark.parametrize("config", configs(torch.bfloat16), ids=lambda config: f"up-to-{config.up_to}")
def test_ids_of_64_bits_compile(config, tmp_path, monkeypatch):
    """The interpreter does not mind a variable that changes its type in a loop; the compiler does."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert compile_config(config, Types("bf16", ids="i64"), compute_capability=90)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", (1, 4, 16, 64, 500, 2000))
def test_sizes_of_a_real_model_on_a_gpu(tokens, dtype):
    seed = random.SystemRandom().randrange(2**31)
    widths = tuple(random.Random(seed).choices(range(769), k=128))
    problem = check_triton(Case(tokens, 2048, widths, 8), dtype, seed, "cuda")
    assert not problem, f"seed {seed}: {problem}"


@needs_gpu
@pytest.mark.parametrize("tokens", (1, 7, 70))
def test_a_cuda_graph_replays_another_routing_with_the_same_bits(tokens):
    from pruned_vllm.kernels.ragged_moe_triton import ragged_moe

    case = Case(tokens, 72, MANY, 8, "any")
    first, other = (random_inputs(case, torch.bfloat16, seed, "cuda") for seed in (2, 4))
    ragged_moe(*first)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ragged_moe(*first)
    for place, value in zip(first[:-1], other[:-1], strict=True):
        place.copy_(value)
    graph.replay()
    problem = compare(out, *reference(other), torch.bfloat16)
    assert not problem, problem
    assert torch.equal(out, ragged_moe(*other))


@pytest.mark.parametrize("pairs", (1, 37, 600, 5000))
def test_schedule(interpreter, pairs):
    """Tiles hold every pair of an expert with channels once, in order; entries that are not needed say so."""
    widths, block_m = (4, 0, 1, 3, 9), 16
    offsets = [sum(widths[:expert]) for expert in range(len(widths) + 1)]
    ids = torch.randint(-1, len(widths) + 1, (pairs,)).tolist()
    tiles, sorted_pairs = interpreter(schedule, [[i] for i in ids], offsets, block_m)
    expected = []
    for expert, width in enumerate(widths):
        mine = [pair for pair in range(pairs) if ids[pair] == expert and width]
        expected += [(expert, mine[i : i + block_m]) for i in range(0, len(mine), block_m)]
    used, unused = tiles[: len(expected)], tiles[len(expected) :]
    assert [(expert, sorted_pairs[row : row + rows]) for expert, row, rows in used] == expected
    assert all(expert == -1 for expert, _, _ in unused)


def test_a_routing_can_need_every_entry_of_the_schedule(interpreter):
    tiles, _ = interpreter(schedule, [[0]] * 17 + [[1]] * 17 + [[2]], [0, 2, 3, 4], 16)
    assert [expert for expert, _, _ in tiles] == [0, 0, 1, 1, 2]


def test_arguments_that_do_not_fit_are_all_listed():
    inputs = random_inputs(Case(3, 8, (2, 4), 2), torch.float32, 0, "cpu")
    check_arguments(*inputs)
    wrong = inputs._replace(
        x=inputs.x.double(),
        gate_up=inputs.gate_up[:, :, :4],
        offsets=inputs.offsets.float(),
        topk_ids=inputs.topk_ids[:2],
        max_width=-1,
    )
    with pytest.raises(ValueError) as refusal:
        check_arguments(*wrong)
    message = str(refusal.value)
    parts = (
        "x is torch.float64; float32, bfloat16 or float16 are supported",
        "gate_up has shape [2, 6, 4] and down [6, 8]; they must be [2, rows, hidden] and [rows, hidden]",
        "gate_up is torch.float32, x torch.float64",
        "down is torch.float32, x torch.float64",
        "gate_up is not contiguous",
        "offsets is torch.float32 [3]",
        "topk_ids is torch.int32 [2, 2], not int32 or int64 [3, topk]",
        "topk_weights is torch.float32 [3, 2], not floats like topk_ids",
        "max_width is -1",
    )
    assert [part for part in parts if part not in message] == []
    assert message.count("\n  - ") == len(parts)
    with pytest.raises(ValueError, match="x has shape"):
        check_arguments(*inputs._replace(x=inputs.x[0]))


def test_tensors_in_cpu_memory_are_refused_without_the_interpreter():
    from pruned_vllm.kernels.ragged_moe_triton import INTERPRETED, ragged_moe

    if INTERPRETED:
        pytest.skip("TRITON_INTERPRET is set")
    with pytest.raises(ValueError, match="CPU memory"):
        ragged_moe(*random_inputs(CASES[1], torch.float32, 0, "cpu"))
