"""convert-pruned on files with fused projections: parts are rows of them, or a message says what is wrong."""

import json
from pathlib import Path

import pytest
import torch
from helpers.masked import RAGGED, convert_pruned, edit_json, edit_weights
from helpers.tiny import tiny_model, write_masked
from safetensors.torch import load_file

from pruned_vllm.formats.biases import complete_biases
from pruned_vllm.formats.config import read_config
from pruned_vllm.formats.fused import unfused
from pruned_vllm.formats.headers import read_headers

QKV, GATE_UP = "model.layers.1.self_attn.qkv_proj.weight", "model.layers.1.mlp.gate_up_proj.weight"
HEADS, KV_HEADS, HEAD_DIM, WIDTH = 6, 3, 32, 40


@pytest.fixture
def fused(tmp_path) -> Path:
    return write_masked(tmp_path / "ckpt", tiny_model("phi3", HEADS, KV_HEADS, WIDTH), RAGGED)


def test_parts_are_the_rows_of_the_fused_tensor(fused):
    tensors, found = load_file(fused / "model.safetensors"), unfused(read_config(fused), read_headers(fused))
    query, key_value = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    expected = dict(zip("qkv", tensors[QKV].split([query, key_value, key_value]), strict=True))
    expected |= dict(zip(("gate", "up"), tensors[GATE_UP].chunk(2), strict=True))
    assert not [name for name in found if "qkv" in name or "gate_up" in name]
    for part, weight in expected.items():
        stored = found[f"model.layers.1.{'mlp' if part in ('gate', 'up') else 'self_attn'}.{part}_proj.weight"]
        start, end = stored.span
        content = stored.file.read_bytes()[start:end]
        assert stored.shape == tuple(weight.shape) and content == weight.numpy().tobytes(), part


def test_nothing_is_taken_apart_twice(fused, tmp_path):
    assert convert_pruned(fused, tmp_path / "out") == 0
    config, tensors = read_config(tmp_path / "out"), read_headers(tmp_path / "out")
    assert unfused(config, tensors) == tensors and complete_biases(config, tensors)[1] == tensors


def stretched(directory: Path, name: str, rows: int) -> None:
    tensor = load_file(directory / "model.safetensors")[name]
    edit_weights(directory, {name: torch.cat((tensor, tensor))[: len(tensor) + rows]})


DAMAGES = {
    "a row too many": (
        lambda ckpt: stretched(ckpt, QKV, 1),
        f"{QKV}: the file has [385, 96], config.json says [384, 96], the rows of q_proj, k_proj, v_proj",
    ),
    "a row too few": (
        lambda ckpt: stretched(ckpt, GATE_UP, -1),
        f"{GATE_UP}: the file has [79, 96], config.json says [80, 96], the rows of gate_proj, up_proj",
    ),
    "other KV heads": (
        lambda ckpt: edit_json(ckpt / "config.json", num_key_value_heads=6),
        "config.json says [576, 96]",
    ),
    "a vector": (lambda ckpt: edit_weights(ckpt, {QKV: torch.ones(384)}), "the file has [384], config.json says"),
    "no rows": (lambda ckpt: edit_weights(ckpt, {QKV: torch.ones(0, 96)}), "the file has [0, 96], config.json says"),
    "parts beside it": (
        lambda ckpt: edit_weights(ckpt, {QKV.replace("qkv", "q"): torch.ones(192, 96)}),
        "model.layers.1.self_attn.q_proj.weight: there as part of model.layers.1.self_attn.qkv_proj, and by itself",
    ),
    "missing": (
        lambda ckpt: edit_weights(ckpt, {}, remove=(QKV,)),
        "model.layers.1.self_attn.q_proj.weight [192, 96]: missing",
    ),
    "a layer too many": (
        lambda ckpt: edit_json(ckpt / "config.json", num_hidden_layers=2),
        "says 2 layers, the files have 3",
    ),
    "a bias": (
        lambda ckpt: edit_weights(ckpt, {QKV.replace("weight", "bias"): torch.ones(384)}),
        "model.layers.1.self_attn.qkv_proj.bias [384]: not a tensor of Phi3ForCausalLM",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_fused_tensors_that_do_not_fit_are_refused(fused, tmp_path, capsys, name):
    damage, sentence = DAMAGES[name]
    damage(fused)
    assert convert_pruned(fused, tmp_path / "out") == 2
    assert sentence in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_user_is_told_what_depends_on_the_length(tmp_path, capsys):
    factors = {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
    rope = {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **factors}}
    model = tiny_model("phi3", 6, 6, WIDTH, hidden_size=192, original_max_position_embeddings=64, **rope)
    write_masked(tmp_path / "ckpt", model, RAGGED)
    assert convert_pruned(tmp_path / "ckpt", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "long_factor: vLLM rotates all positions by long_factor where --max-model-len is above" in said
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (
        written["architectures"] == ["PrunedPhi3ForCausalLM"] and written["rope_parameters"]["rope_type"] == "longrope"
    )
