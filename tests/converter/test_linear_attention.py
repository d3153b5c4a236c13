"""Models in which some layers have linear attention: what convert-pruned does with it, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch
from helpers.masked import convert_pruned, edit_json, edit_weights
from helpers.tiny import LINEAR, expert_masks, masks_for, tiny_model, write_masked
from helpers.wrapped import fuse_experts
from safetensors.torch import load_file, save_file

from converter.quantize.quantization import plan_quantization
from converter.quantize.schemes import SCHEMES, Wanted
from pruned_vllm.formats.config import read_config
from pruned_vllm.formats.fused import unfused
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.headers import read_headers

WIDTH = 40
EXPERTS = [[17, 0, 24, 5], [1, 2, 3, 4], [24, 23, 1, 12]]
HEADS = [[1, 0.5, 0, 0, 2, 0], [], [0, 0, 3, 1, 0, 0]]
GATE_UP, DOWN = ("model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj")


def masked(directory: Path, model_type: str = "qwen3_5_text", **config) -> Path:
    model = tiny_model(model_type, 6, 3, WIDTH, **config)
    experts = expert_masks(model, EXPERTS)
    channels = [] if experts else [torch.arange(WIDTH) % 3, torch.arange(WIDTH) % 2, torch.ones(WIDTH)]
    return write_masked(directory, model, masks_for(HEADS, channels, model) | experts)


@pytest.mark.parametrize("model_type", ["qwen3_5_text", "qwen3_next"])
def test_its_tensors_are_copied(tmp_path, model_type):
    ckpt = masked(tmp_path / "ckpt", model_type)
    assert convert_pruned(ckpt, tmp_path / "out") == 0
    before, after = (load_file(path / "model.safetensors") for path in (ckpt, tmp_path / "out"))
    names = [name for name in before if ".linear_attn." in name]
    assert {name for name in after if ".linear_attn." in name} == set(names) and len(names) >= 7
    assert all(torch.equal(before[name], after[name]) for name in names)


def test_the_rows_of_a_gate_go_with_its_head(tmp_path):
    ckpt = masked(tmp_path / "ckpt")
    assert convert_pruned(ckpt, tmp_path / "out") == 0
    name = "model.layers.2.self_attn.q_proj.weight"
    before, after = (load_file(path / "model.safetensors")[name] for path in (ckpt, tmp_path / "out"))
    assert torch.equal(after, before.view(6, 64, -1)[[2, 3]].flatten(0, 1))


REFUSED = {
    "a head mask of such a layer": (
        lambda ckpt: save_file(
            {"model.layers.1.self_attn.head_mask": torch.ones(6)}, ckpt / "pruning_masks.safetensors"
        ),
        "model.layers.1.self_attn.head_mask: the layer has linear attention, and vLLM has one shape of state",
    ),
    "no such attention": (
        lambda ckpt: edit_json(ckpt / "config.json", layer_types=["linear_attention"] * 3),
        "layer_types has no 'full_attention' in 3 layers",
    ),
    "another kind": (
        lambda ckpt: edit_json(ckpt / "config.json", layer_types=["full_attention", "mamba", "full_attention"]),
        "it must be a list of 'linear_attention' and 'full_attention'",
    ),
    "heads that do not go together": (
        lambda ckpt: edit_json(ckpt / "config.json", linear_num_key_heads=3),
        "linear_num_value_heads 4 is not a multiple of linear_num_key_heads 3",
    ),
    "other sizes": (
        lambda ckpt: edit_json(ckpt / "config.json", linear_conv_kernel_dim=3),
        "model.layers.1.linear_attn.conv1d.weight: the file has [1024, 1, 4], config.json says [1024, 1, 3]",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(tmp_path, capsys, name):
    damage, sentence = REFUSED[name]
    damage(masked(tmp_path / "ckpt"))
    assert convert_pruned(tmp_path / "ckpt", tmp_path / "out") == 2
    assert sentence in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_list_of_dropped_sublayers_must_not_name_it(tmp_path, capsys):
    tiny_model("qwen3_5_text", 6, 3, WIDTH).save_pretrained(tmp_path / "dense")
    (tmp_path / "layer_drop_config.txt").write_text("attn\nattn\nmlp\n")
    base = ("--base-model", tmp_path / "dense")
    assert convert_pruned(tmp_path / "layer_drop_config.txt", tmp_path / "out", *base) == 2
    error = capsys.readouterr().err
    assert "layer 1: its linear attention cannot be dropped" in error and "layer 0" not in error
    (tmp_path / "layer_drop_config.txt").write_text("attn\nmlp\nmlp\n")
    assert convert_pruned(tmp_path / "layer_drop_config.txt", tmp_path / "out", *base) == 0
    layers = ModelGeometry.from_config(json.loads((tmp_path / "out" / "config.json").read_text())).layers
    assert [layer.skip for layer in layers] == [["attention"], ["mlp"], ["mlp"]]


def test_few_shapes_keep_both_kinds_of_layers(tmp_path, capsys):
    ckpt = masked(tmp_path / "ckpt", num_hidden_layers=6)
    (ckpt / "pruning_masks.safetensors").unlink()
    model = tiny_model("qwen3_5_text", 6, 3, WIDTH, num_hidden_layers=6)
    heads = [[1] * kept + [0] * (6 - kept) for kept in (2, 0, 4, 6, 0, 2)]
    channels = [torch.arange(WIDTH) < kept for kept in (5, 9, 13, 17, 21, 25)]
    masks = masks_for(heads, channels, model)
    save_file(masks, ckpt / "pruning_masks.safetensors")
    assert convert_pruned(ckpt, tmp_path / "one", "--max-distinct-shapes", 1) == 2
    assert "2 kinds of layers (complete, linear attention)" in capsys.readouterr().err
    assert convert_pruned(ckpt, tmp_path / "out", "--max-distinct-shapes", 3) == 0
    assert "Verified against the pruned model" in capsys.readouterr().out
    layers = ModelGeometry.from_config(json.loads((tmp_path / "out" / "config.json").read_text())).layers
    assert len(set(layers)) == 3 and [layer.linear_attention for layer in layers] == [False, True, False] * 2


def test_quantizing_leaves_it_alone():
    config = {"model_type": "qwen3_5_text", "hidden_size": 64, "intermediate_size": 64, "vocab_size": 64, **LINEAR}
    config |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    quantization, _ = plan_quantization(Wanted(SCHEMES["w8a8-int8"]), ModelGeometry.from_config(config))
    assert "model.layers.1.mlp.up_proj" in quantization.modules and "model.layers.1.linear_attn.in_proj_qkv" in (
        quantization.ignore
    )
    assert not [name for name in quantization.modules if "linear_attn" in name]


@pytest.fixture
def fused(tmp_path) -> Path:
    """A masked checkpoint whose files hold all experts of a layer in two tensors, as published ones do."""
    ckpt = masked(tmp_path / "ckpt", "qwen3_5_moe_text")
    fuse_experts(ckpt)
    return ckpt


def test_experts_in_one_tensor_are_taken_apart(fused, tmp_path):
    whole = masked(tmp_path / "whole", "qwen3_5_moe_text")
    tensors, found = load_file(whole / "model.safetensors"), unfused(read_config(fused), read_headers(fused))
    assert set(found) == set(tensors)
    for name, stored in found.items():
        start, end = stored.span
        assert stored.shape == tuple(tensors[name].shape), name
        assert stored.file.read_bytes()[start:end] == tensors[name].numpy().tobytes(), name
    assert convert_pruned(fused, tmp_path / "out") == convert_pruned(whole, tmp_path / "other") == 0
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "other"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


DAMAGES = {
    "experts the other way round": (
        lambda ckpt: edit_weights(ckpt, {GATE_UP: torch.ones(4, 96, 48)}),
        f"{GATE_UP}: the file has [4, 96, 48], config.json says [4, 48, 96], the rows of gate_proj, up_proj",
    ),
    "an expert too few": (
        lambda ckpt: edit_weights(ckpt, {DOWN: torch.ones(3, 96, 24)}),
        f"{DOWN}: the file has [3, 96, 24], config.json says [4, 96, 24], the rows of down_proj",
    ),
    "a matrix": (
        lambda ckpt: edit_weights(ckpt, {DOWN: torch.ones(384, 24)}),
        f"{DOWN}: the file has [384, 24], config.json says [4, 96, 24]",
    ),
    "parts beside it": (
        lambda ckpt: edit_weights(ckpt, {DOWN.replace("down_proj", "2.down_proj.weight"): torch.ones(96, 24)}),
        "model.layers.1.mlp.experts.2.down_proj.weight: there as part of model.layers.1.mlp.experts.down_proj",
    ),
    "missing": (
        lambda ckpt: edit_weights(ckpt, {}, remove=(DOWN,)),
        "model.layers.1.mlp.experts.0.down_proj.weight [96, 24]: missing",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_experts_that_do_not_fit_are_refused(fused, tmp_path, capsys, name):
    damage, sentence = DAMAGES[name]
    damage(fused)
    assert convert_pruned(fused, tmp_path / "out") == 2
    assert sentence in capsys.readouterr().err and not (tmp_path / "out").exists()
