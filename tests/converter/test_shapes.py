"""The shapes that layers are written in: few of them at the proven lowest cost, and padding that changes no output."""

import itertools
import json
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers.masked import convert_pruned
from helpers.tiny import HEAD_DIM, masks_for, tiny_model, write_masked
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from converter.plan import Plan, make_plan
from converter.shapes import fits, with_aligned_width, with_even_groups, with_few_shapes
from converter.streaming import write_tensors
from converter.table import totals
from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.layer import LayerGeometry

# --- few distinct shapes


def layer_cost(layer: LayerGeometry) -> int:
    return 5 * layer.num_attention_heads + 4 * layer.num_key_value_heads + 3 * layer.intermediate_size + 1


def every_shape(layers: Sequence[LayerGeometry]) -> list[LayerGeometry]:
    """All shapes up to the largest sizes, even or as they are: far more than can be useful."""
    sizes = [
        range(max(size(layer) for layer in layers) + 1)
        for size in (
            lambda layer: layer.num_key_value_heads,
            lambda layer: layer.widest_group,
            lambda layer: layer.intermediate_size,
        )
    ]
    groups = {(group,) * kv_heads for kv_heads in sizes[0] for group in sizes[1]}
    groups |= {layer.query_heads_per_kv_head for layer in layers}
    return [LayerGeometry(query_heads, width) for query_heads in groups for width in sizes[2]]


def brute_force(layers: Sequence[LayerGeometry], limit: int) -> int:
    """The lowest cost: tries every way to split the distinct layers, each part in its cheapest shape."""
    all_shapes = every_shape(layers)
    distinct = list(dict.fromkeys(layers))

    @cache
    def cheapest(part: frozenset[int]) -> int | None:
        inside = [distinct[index] for index in part]
        costs = [layer_cost(shape) for shape in all_shapes if all(fits(layer, shape) for layer in inside)]
        return min(costs) * sum(layers.count(layer) for layer in inside) if costs else None

    def splits(index: int, parts: list[frozenset[int]]):
        if index == len(distinct):
            yield parts
            return
        for number, part in enumerate(parts):
            yield from splits(index + 1, [*parts[:number], part | {index}, *parts[number + 1 :]])
        if len(parts) < limit:
            yield from splits(index + 1, [*parts, frozenset({index})])

    totals_of_splits = ([cheapest(part) for part in parts] for parts in splits(0, []))
    return min(sum(costs) for costs in totals_of_splits if None not in costs)


groups = st.lists(st.integers(1, 3), max_size=3).map(tuple)
few_layers = st.lists(st.builds(LayerGeometry, groups, st.integers(0, 5)), min_size=1, max_size=6)


@settings(max_examples=300, deadline=None)
@given(few_layers, st.integers(1, 6))
def test_few_shapes_cost_as_little_as_any(layers, limit):
    kinds = len({tuple(layer.skip) for layer in layers})
    if limit < kinds:
        with pytest.raises(InputError, match=f"the smallest number that works is {kinds}"):
            with_few_shapes(layers, layer_cost, limit)
        return
    result = with_few_shapes(layers, layer_cost, limit)
    assert len(set(result)) <= limit
    assert all(fits(layer, shape) for layer, shape in zip(layers, result, strict=True))
    assert sum(map(layer_cost, result)) == brute_force(layers, limit)


def dynamic_program(widths: list[int], cost: Callable[[int], int], limit: int) -> int:
    """The classic: sorted widths in at most `limit` runs, each as wide as its last."""
    widths = sorted(widths)
    best = [0] + [10**18] * len(widths)
    for _ in range(limit):
        best = [0] + [
            min(best[start] + (end - start) * cost(widths[end - 1]) for start in range(end))
            for end in range(1, len(widths) + 1)
        ]
    return best[-1]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 28672), min_size=1, max_size=80),
    st.integers(1, 12),
    st.sampled_from([(1,) * 8, (2, 1, 4), (3, 3)]),
)
def test_equal_attention_is_the_dynamic_program_over_sorted_widths(widths, limit, attention):
    result = with_few_shapes([LayerGeometry(attention, width) for width in widths], layer_cost, limit)
    assert sum(map(layer_cost, result)) == dynamic_program(
        widths, lambda width: layer_cost(LayerGeometry(attention, width)), limit
    )


def test_widths_and_heads_together_need_more_than_a_sort():
    corners = [LayerGeometry((1,) * heads, width) for heads, width in [(1, 1), (9, 1), (1, 9), (9, 9)]]
    layers = [layer for layer, count in zip(corners, (1, 5, 5, 5), strict=True) for _ in range(count)]
    assert set(with_few_shapes(layers, layer_cost, 3)) == set(corners[1:])
    assert set(with_few_shapes(layers, layer_cost, 1)) == {corners[3]}


def test_the_same_groups_in_another_order_are_one_shape():
    layers = [LayerGeometry(order, 4) for order in itertools.permutations((1, 2, 3))]
    assert with_few_shapes(layers, layer_cost, 6) == layers
    assert with_few_shapes(layers, layer_cost, 1) == [LayerGeometry((1, 2, 3), 4)] * 6


def test_aligned_widths():
    def aligned(width):
        return with_aligned_width(LayerGeometry((1,), width), 32, LayerGeometry((1,), 100)).intermediate_size

    assert [aligned(width) for width in (0, 1, 32, 33, 96, 97, 100)] == [0, 32, 32, 64, 96, 100, 100]
    assert with_even_groups(LayerGeometry((1, 3, 2), 5)) == LayerGeometry((3, 3, 3), 5)
    assert with_even_groups(LayerGeometry((), 5)) == LayerGeometry((), 5)


# --- padding changes no output

RAGGED_GQA = masks_for(
    # 4 KV heads with 2 query heads each: uneven, all of attention gone, the same groups in another order, untouched.
    [[1, 0, 2, 1, 0, 0, 0, 3], [0] * 8, [2, 1, -1, 0, 0, 1, 0, 0], [1] * 8],
    [torch.arange(40) < 17, torch.arange(40) > 30, torch.zeros(40), torch.arange(40) % 2 * 1.5],
)
RAGGED_MHA = masks_for(
    [[1, 0, 2, 1, 0, 0], [0] * 6, [0, 0, 0, 0, -1, 0], [1] * 6],
    [torch.arange(40) < 17, torch.arange(40) > 30, torch.arange(40) == 4, torch.zeros(40)],
)
VARIANTS = {
    "exact": {},
    "padded groups": {"gqa_layout": "padded"},
    "aligned": {"alignment": 16},
    "3 shapes": {"max_distinct_shapes": 3},
    "all": {"gqa_layout": "padded", "alignment": 12, "max_distinct_shapes": 3},
}


def plan_of(directory, masks, variant: dict, site: str = "product", model_type: str = "llama") -> Plan:
    heads = len(masks["model.layers.0.self_attn.head_mask"])
    if not directory.exists():
        biases = {"attention_bias": True, "mlp_bias": True} if model_type == "llama" else {}
        model = tiny_model(model_type, heads, 4 if heads == 8 else heads, 40, num_hidden_layers=4, **biases)
        write_masked(directory, model, masks, site)
        weights = load_file(directory / "model.safetensors")
        for name in weights:
            if name.endswith("bias"):
                weights[name].normal_()
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return make_plan(directory, **variant)


def tensors_of(plan: Plan) -> dict[str, torch.Tensor]:
    with tempfile.TemporaryDirectory() as directory:
        write_tensors(plan, Path(directory), max_shard_bytes=1 << 30)
        return load_file(Path(directory) / "model.safetensors")


def run_layer(plan: Plan, tensors: dict[str, torch.Tensor], index: int, hidden: torch.Tensor) -> torch.Tensor:
    """One layer in plain torch, without norms and positions, [tokens, hidden] to [tokens, hidden]."""
    layer, prefix = plan.pruned.layers[index], f"model.layers.{index}."

    def linear(name, values):
        weight, bias = tensors[f"{prefix}{name}.weight"], tensors.get(f"{prefix}{name}.bias")
        return torch.nn.functional.linear(values, weight, bias)

    def last_bias(name):
        return tensors.get(f"{prefix}{name}.bias", torch.zeros(hidden.shape[1]))

    if layer.query_heads_per_kv_head:
        queries, keys, values = (
            linear(f"self_attn.{name}_proj", hidden).unflatten(1, (-1, HEAD_DIM)).transpose(0, 1) for name in "qkv"
        )
        reads = torch.arange(len(keys)).repeat_interleave(torch.tensor(layer.query_heads_per_kv_head))
        weights = (queries @ keys[reads].mT / HEAD_DIM**0.5).softmax(-1)
        hidden = hidden + linear("self_attn.o_proj", (weights @ values[reads]).transpose(0, 1).flatten(1))
    else:
        hidden = hidden + last_bias("self_attn.o_proj")
    if layer.intermediate_size:
        gate = torch.nn.functional.silu(linear("mlp.gate_proj", hidden))
        return hidden + linear("mlp.down_proj", gate * linear("mlp.up_proj", hidden))
    return hidden + last_bias("mlp.down_proj")


@pytest.mark.parametrize("variant", list(VARIANTS.values())[1:], ids=list(VARIANTS)[1:])
@pytest.mark.parametrize("site", ["product", "gate_and_up"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize("masks", [RAGGED_GQA, RAGGED_MHA], ids=["gqa", "mha"])
def test_padding_adds_zeros_and_changes_no_output(tmp_path, masks, model_type, site, variant):
    exact_plan = plan_of(tmp_path / "ckpt", masks, {}, site, model_type)
    plan = plan_of(tmp_path / "ckpt", masks, variant, site, model_type)
    exact, padded = tensors_of(exact_plan), tensors_of(plan)
    assert plan.exact == exact_plan.exact == exact_plan.pruned
    assert {name: tuple(tensor.shape) for name, tensor in padded.items()} == plan.pruned.tensor_shapes()
    assert exact.keys() == padded.keys()
    for name in exact:  # the same numbers, maybe in other places, and nothing but zeros beside them
        numbers, padded_numbers = exact[name].flatten(), padded[name].flatten()
        assert torch.equal(numbers[numbers != 0].sort().values, padded_numbers[padded_numbers != 0].sort().values), name
    hidden = torch.randn(7, 96, generator=torch.Generator().manual_seed(3)) / 4
    for index in range(4):
        expected = run_layer(exact_plan, exact, index, hidden)
        torch.testing.assert_close(run_layer(plan, padded, index, hidden), expected, rtol=1e-5, atol=1e-4)


def test_padded_groups_keep_their_heads_in_place(tmp_path):
    exact = tensors_of(plan_of(tmp_path / "ckpt", RAGGED_GQA, {}))
    plan = plan_of(tmp_path / "ckpt", RAGGED_GQA, {"gqa_layout": "padded"})
    assert plan.exact.layers[0].query_heads_per_kv_head == (1, 2, 1)
    assert plan.pruned.layers[0].query_heads_per_kv_head == (2, 2, 2)
    padded = tensors_of(plan)
    for kind, name in (("q", "q_proj.weight"), ("q", "q_proj.bias"), ("o", "o_proj.weight")):
        name = f"model.layers.0.self_attn.{name}"
        after = (padded[name] if kind == "q" else padded[name].T).unflatten(0, (6, HEAD_DIM))
        before = (exact[name] if kind == "q" else exact[name].T).unflatten(0, (4, HEAD_DIM))
        assert torch.equal(after[[0, 2, 3, 4]], before) and not after[[1, 5]].any()
    assert torch.equal(*(tensors["model.layers.0.self_attn.k_proj.weight"] for tensors in (padded, exact)))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_random_masks_are_cut_to_the_geometry(tmp_path_factory, data):
    values = st.sampled_from([0.0, 0.0, 1.0, -0.7, 3.0])
    masks = masks_for(
        data.draw(st.lists(st.lists(values, min_size=8, max_size=8), min_size=4, max_size=4)),
        [torch.tensor(data.draw(st.lists(values, min_size=40, max_size=40))) for _ in range(4)],
    )
    variant = {
        "gqa_layout": data.draw(st.sampled_from(["compact", "padded"])),
        "alignment": data.draw(st.sampled_from([1, 16])),
        "max_distinct_shapes": data.draw(st.sampled_from([None, 4])),
    }
    plan = plan_of(tmp_path_factory.mktemp("random") / "ckpt", masks, variant)
    tensors = tensors_of(plan)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == plan.pruned.tensor_shapes()
    assert all(fits(*pair) for pair in zip(plan.exact.layers, plan.pruned.layers, strict=True))


# --- the command


def test_command_writes_what_the_options_ask_for(tmp_path, capsys):
    plan_of(tmp_path / "ckpt", RAGGED_GQA, {})
    assert convert_pruned(tmp_path / "ckpt", tmp_path / "out") == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["per_layer_config"]["0"]["query_heads_per_kv_head"] == [1, 2, 1]
    assert config["per_layer_config"]["1"]["skip"] == ["attention"]
    assert config["per_layer_config"]["2"]["skip"] == ["mlp"]
    assert config["pruning"]["alignment"] == 1
    assert "padding" not in capsys.readouterr().out.replace("without padding", "")
    options = ("--gqa-layout", "padded", "--align", "32", "--max-distinct-shapes", "3")
    assert convert_pruned(tmp_path / "ckpt", tmp_path / "out2", *options) == 0
    config = json.loads((tmp_path / "out2" / "config.json").read_text())
    assert config["pruning"]["alignment"] == 32
    assert config["per_layer_config"]["1"] == {"skip": ["attention"], "intermediate_size": 32}
    assert "query_heads_per_kv_head" not in config
    printed = capsys.readouterr().out
    assert "17+15" in printed and "Distinct layer shapes: 3 in 4 layers" in printed
    assert "bytes of KV cache per token on top of" in printed and "17+15" in (tmp_path / "out2/README.md").read_text()
    assert convert_pruned(tmp_path / "ckpt", tmp_path / "out3", "--max-distinct-shapes", "2") == 2
    assert "the smallest number that works is 3" in capsys.readouterr().err and not (tmp_path / "out3").exists()


@pytest.mark.parametrize("option", [("--align", "0"), ("--align", "auto"), ("--max-distinct-shapes", "0")])
def test_bad_options(tmp_path, option, capsys):
    with pytest.raises(SystemExit) as error:
        convert_pruned(tmp_path / "ckpt", tmp_path / "out", *option)
    assert error.value.code == 2


def test_a_model_that_loses_everything_converts(tmp_path):
    masks = masks_for([[0] * 8] * 4, [torch.zeros(40)] * 4)
    options = {"gqa_layout": "padded", "alignment": 32, "max_distinct_shapes": 1}
    plan = plan_of(tmp_path / "ckpt", masks, options)
    assert sorted(name for name in tensors_of(plan) if ".0." in name) == [
        "model.layers.0.mlp.down_proj.bias",
        "model.layers.0.self_attn.o_proj.bias",
    ]
    assert "a token's KV cache shrinks to 0.0%." in "\n".join(totals(plan))
    assert convert_pruned(tmp_path / "ckpt", tmp_path / "out") == 0
