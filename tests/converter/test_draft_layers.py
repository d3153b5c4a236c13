"""Layers that draft tokens, which checkpoints of GLM and DeepSeek have behind the last one: left out, and said so."""

import json

import pytest
import torch
from helpers.masked import convert_pruned, edit_json, edit_weights
from helpers.tiny import NUM_LAYERS, expert_masks, prompts, tiny_model, write_masked
from safetensors.torch import load_file

from learner.model.masking import apply_masks
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.hf import load_pruned


def masked_with_draft_layers(directory, model_type: str, count: int = 1, **config):
    """A masked checkpoint with so many more layers, of the last one's tensors and those that only such layers have."""
    model = tiny_model(model_type, 6, 6, 24, **config)
    masks = expert_masks(model, [[17, 0, 24, 5]] * NUM_LAYERS)
    write_masked(directory, model, masks)
    last, added = f"model.layers.{NUM_LAYERS - 1}.", {}
    for number in range(NUM_LAYERS, NUM_LAYERS + count):
        for name, tensor in load_file(directory / "model.safetensors").items():
            if name.startswith(last):
                added[name.replace(last, f"model.layers.{number}.")] = tensor.clone()
        for module in ("eh_proj", "enorm", "hnorm", "shared_head.head", "shared_head.norm", "embed_tokens"):
            added[f"model.layers.{number}.{module}.weight"] = torch.ones(2, 96)
    edit_weights(directory, added)
    edit_json(directory / "config.json", num_nextn_predict_layers=count)
    return model, masks


@pytest.mark.parametrize(("model_type", "count"), [("glm4_moe", 1), ("deepseek_v3", 2), ("glm4_moe_lite", 1)])
def test_they_are_left_out(tmp_path, capsys, model_type, count):
    model, masks = masked_with_draft_layers(tmp_path / "ckpt", model_type, count)
    assert convert_pruned(tmp_path / "ckpt", tmp_path / "out") == 0
    captured = " ".join(capsys.readouterr().out.split())
    assert f"OUT has no layers for multi-token prediction; config.json counted {count}." in captured
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 0
    assert (
        load_file(tmp_path / "out" / "model.safetensors").keys()
        == ModelGeometry.from_config(config).tensor_shapes().keys()
    )
    tokens = torch.tensor(prompts()[-1:])
    with torch.no_grad(), apply_masks(model, masks):
        torch.testing.assert_close(
            load_pruned(tmp_path / "out")(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4
        )


def test_layers_that_config_json_does_not_count_are_refused(tmp_path, capsys):
    masked_with_draft_layers(tmp_path / "ckpt", "glm4_moe", 2)
    edit_json(tmp_path / "ckpt" / "config.json", num_nextn_predict_layers=1)
    assert convert_pruned(tmp_path / "ckpt", tmp_path / "out") == 2
    assert "config.json says 3 layers, the files have 5" in capsys.readouterr().err


def test_a_count_that_is_none(tmp_path, capsys):
    masked_with_draft_layers(tmp_path / "ckpt", "glm4_moe")
    edit_json(tmp_path / "ckpt" / "config.json", num_nextn_predict_layers="1")
    assert convert_pruned(tmp_path / "ckpt", tmp_path / "out") == 2
    assert "num_nextn_predict_layers is '1'" in capsys.readouterr().err


def test_the_correction_bias_keeps_its_dtype(tmp_path):
    model = tiny_model("glm4_moe", 6, 6, 24)
    write_masked(tmp_path / "ckpt", model, expert_masks(model, [[17, 0, 24, 5]] * NUM_LAYERS))
    assert convert_pruned(tmp_path / "ckpt", tmp_path / "out", "--dtype", "bfloat16") == 0
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    assert {dtype for name, dtype in dtypes.items() if not name.endswith("e_score_correction_bias")} == {torch.bfloat16}
    biases = {name: tensor for name, tensor in tensors.items() if name.endswith("e_score_correction_bias")}
    assert len(biases) == NUM_LAYERS and all(torch.equal(model.get_buffer(name), biases[name]) for name in biases)
