"""Tensor parallelism with quantized weights as a pure function: what each rank gets is what it would have got plain."""

import math

import pytest
import torch
from helpers.compressed import COMPRESSED, SCHEMES, read, round_weight, store

from pruned_vllm.common.padding import PAD, take_or_zero
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.quantization import Quantization
from pruned_vllm.serving.layout_changes import layout_changes
from pruned_vllm.serving.model_layout import ModelLayout

CONFIG = {
    "architectures": ["PrunedLlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "vocab_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 12,
    "num_key_value_heads": 3,
    "head_dim": 32,
    "intermediate_size": 160,
    "attention_bias": True,
    "per_layer_config": {
        "0": {"num_attention_heads": 7, "query_heads_per_kv_head": [3, 1, 3], "intermediate_size": 99},
        "1": {"num_attention_heads": 6, "num_key_value_heads": 2, "query_heads_per_kv_head": [5, 1]},
    },
}
COLUMN_PARALLEL = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def layouts(scheme, ranks: int, **changes):
    config = CONFIG | changes
    geometry = ModelGeometry.from_config(config)
    quantization = Quantization.from_config(config | {"quantization_config": scheme.config()})
    return ModelLayout.from_geometry(geometry, ranks), ModelLayout.from_geometry(geometry, ranks, quantization)


def changed(tensor: torch.Tensor, name: str, changes: dict) -> torch.Tensor:
    return take_or_zero(tensor, *changes[name]) if name in changes else tensor


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("name", COMPRESSED)
def test_each_rank_gets_the_weights_it_would_get_plain(name, ranks):
    """Stock loaders cut every tensor into equal parts; each part must widen to the part of the widened weight."""
    scheme, generator = SCHEMES[name], torch.Generator().manual_seed(0)
    plain, quantized = layouts(scheme, ranks)
    changes = layout_changes(quantized)
    # The plain layout has no multiples of channels to keep to, so the moves of the quantized one are taken.
    moves = layout_changes(ModelLayout(plain.geometry, ranks, quantized.layers))
    geometry = plain.geometry
    for tensor_name, shape in geometry.tensor_shapes().items():
        module, _, part = tensor_name.rpartition(".")
        last = module.rpartition(".")[2]
        if part != "weight" or not last.endswith("_proj"):
            continue
        rounded = round_weight(torch.randn(shape, generator=generator), scheme)
        stored = store(rounded, scheme)
        expected = changed(rounded.widened(), tensor_name, moves)
        if last not in COLUMN_PARALLEL and ranks > 1 and scheme.group_size:
            assert expected.shape[1] % (ranks * scheme.group_size) == 0
        tensors = {key: changed(value, f"{module}.{key}", changes) for key, value in stored.items()}
        if tensor_name in moves and expected.shape[0] == moves[tensor_name][1].numel() and moves[tensor_name][0] == 0:
            assert f"{module}.bias" in changes
        for rank in range(ranks):
            held = {key: part_of(value, key, last, rank, ranks, scheme) for key, value in tensors.items()}
            wanted = part_of(expected, "weight", last, rank, ranks, scheme)
            found = read(held, scheme, wanted.shape)
            if last == "down_proj" and tensor_name in moves:
                # Behind the last channel a packed number may hold anything: that channel of padding is 0.
                index = moves[tensor_name][1]
                found[:, index[rank * wanted.shape[1] :][: wanted.shape[1]] == PAD] = 0
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def part_of(tensor: torch.Tensor, key: str, projection: str, rank: int, ranks: int, scheme) -> torch.Tensor:
    """What vLLM's parameters take: outputs of joined layers, inputs of the others; some tensors whole."""
    is_column = projection in COLUMN_PARALLEL
    if key in ("weight_shape", "input_scale") or (
        key == "weight_scale" and not is_column and scheme.group_size is None
    ):
        return tensor
    dim = 0 if is_column else 1
    # A KV head that several ranks share is not moved: vLLM's own loader repeats it.
    size, rest = divmod(tensor.shape[dim], ranks)
    if rest or projection in ("k_proj", "v_proj"):
        return tensor
    return tensor.narrow(dim, rank * size, size)


@pytest.mark.parametrize(
    ("scheme", "changes", "sentence"),
    [
        # A group of 32 inputs holds a head and a part of the next.
        (
            "w4a16 in groups of 32",
            {"head_dim": 48},
            "model.layers.0.self_attn.o_proj: weight_scale has an element for 32",
        ),
        # Heads stay in order, but a group is on two ranks.
        (
            "w4a16 in groups of 32",
            {"head_dim": 16, "num_attention_heads": 6, "num_key_value_heads": 6, "per_layer_config": {}},
            "model.layers.2.self_attn.o_proj: each rank would hold 48 inputs, but 32 are stored together",
        ),
        (
            "w4a16",
            {"head_dim": 36},
            "model.layers.1.self_attn.o_proj: each rank would hold 180 inputs, but 8 are stored together",
        ),
    ],
)
def test_what_is_stored_together_is_not_parted(scheme, changes, sentence):
    _, quantized = layouts(SCHEMES[scheme], 2, **changes)
    with pytest.raises(ValueError, match="--tensor-parallel-size 2 would part what") as error:
        layout_changes(quantized)
    assert sentence in str(error.value) and f"divides head_dim {changes['head_dim']}" in str(error.value)


def test_other_formats_are_refused_only_where_something_moves():
    stored = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
    geometry = ModelGeometry.from_config(CONFIG)
    quantization = Quantization.from_config({"quantization_config": stored})
    assert layout_changes(ModelLayout.from_geometry(geometry, 1, quantization)) == {}
    with pytest.raises(
        ValueError, match="q_proj: int4 weights, .*, gptq cannot be padded, only weights of compressed-"
    ):
        layout_changes(ModelLayout.from_geometry(geometry, 2, quantization))


def test_blocks_move_whole():
    """A block of fp8 weights has one scale; channels of a rank are whole blocks."""
    stored = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
    geometry = ModelGeometry.from_config(CONFIG)
    layout = ModelLayout.from_geometry(geometry, 2, Quantization.from_config({"quantization_config": stored}))
    changes = layout_changes(layout)
    assert layout.layers[0].channels == 64
    dim, index, _ = changes["model.layers.0.mlp.down_proj.weight_scale_inv"]
    assert dim == 1 and index.tolist() == [0, 1, 2, 3]  # 99 channels: the last block holds 3, then padding
    assert changes["model.layers.0.mlp.up_proj.weight_scale_inv"][1].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("ranks", [2, 3])
def test_channels_of_a_rank_suit_the_kernel(ranks):
    geometry = ModelGeometry.from_config(CONFIG)
    scheme = SCHEMES["w4a16 in groups of 32"]
    quantization = Quantization.from_config({"quantization_config": scheme.config()})
    for layer in ModelLayout.from_geometry(geometry, ranks, quantization, packed_multiple=48).layers:
        assert layer.channels % math.lcm(48, 32) == 0
