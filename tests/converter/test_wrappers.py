"""The language model inside of a multimodal one: learned for, converted, and loaded as a model of text alone."""

import json

import pytest
import torch
from helpers.learning import run
from helpers.masked import convert_pruned, edit_json, edit_weights, keep
from helpers.tiny import byte_tokenizer, expert_masks, masks_for, prompts, tiny_model
from helpers.wrapped import WRAPPERS, save_wrapped
from safetensors.torch import load_file, save_file

from learner.model.masking import apply_masks
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.masked import mask_shapes
from pruned_vllm.hf.loading import load_pruned

RAGGED = masks_for(
    [[1, 0.5, 0, 0, 2, 1], [0, 0, 3, 0.3, 0, 0], [1] * 6],
    [keep(40, *range(17)), keep(40, 39), keep(40, *range(0, 40, 2))],
)
EXPERTS = [[17, 0, 24, 5], [1, 2, 3, 4], [24, 23, 1, 12]]
UNIFORM = masks_for([[1, 0.5, 0, 0, 2, 1]] * 3, [keep(40, *range(start, start + 8)) for start in (0, 9, 32)])
CASES = {
    **{name: (name, {}, RAGGED) for name in WRAPPERS},
    "gemma3_text, untied": ("gemma3_text", {"tie_word_embeddings": False}, RAGGED),
    "ministral3, tied": ("ministral3", {"tie_word_embeddings": True}, RAGGED),
    "gemma3_text, uniform": ("gemma3_text", {}, UNIFORM),
}


def masks_that_fit(text, masks: dict) -> dict:
    """Those of `masks` that are for layers as `text` has them, and some for experts."""
    shapes = mask_shapes(ModelGeometry.from_config(text.config.to_dict()))
    return {key: mask for key, mask in masks.items() if shapes.get(key) == mask.shape} | expert_masks(text, EXPERTS)


def masked_wrapper(directory, model_type: str, config: dict, masks: dict):
    """The language model, and a masked checkpoint of the multimodal model that has it."""
    text = tiny_model(model_type, 6, 3, 40, **config)
    save_wrapped(directory, text)
    save_file(masks_that_fit(text, masks), directory / "pruning_masks.safetensors")
    content = {"format_version": 1, "method": "test", "channel_mask_site": "product"}
    (directory / "pruning.json").write_text(json.dumps(content))
    return text, directory


def assert_computes(out, text, masks: dict, site: str = "product"):
    pruned, tokens = load_pruned(out, dtype=torch.float32), torch.tensor(prompts()[-1:])
    with torch.no_grad(), apply_masks(text, masks, site):
        torch.testing.assert_close(pruned(tokens).logits, text(tokens).logits, rtol=1e-4, atol=1e-4)
    return pruned


@pytest.mark.parametrize("name", CASES)
def test_the_language_model_alone_is_converted(tmp_path, capsys, name):
    model_type, config, masks = CASES[name]
    text, ckpt = masked_wrapper(tmp_path / "ckpt", model_type, config, masks)
    stored = set(load_file(ckpt / "model.safetensors"))
    assert any("language_model." in key and "layers.0" in key for key in stored)
    assert any("vision" in key or "visual" in key for key in stored)
    assert any(key.endswith("mlp.experts.gate_up_proj") for key in stored) == (model_type == "qwen3_5_moe_text")
    assert convert_pruned(ckpt, tmp_path / "out") == 0
    said = f"Of {json.loads((ckpt / 'config.json').read_text())['architectures'][0]}, the language model alone was read"
    captured = capsys.readouterr().out
    assert said in captured and "Verified against the pruned model" in captured
    assert said in (tmp_path / "out" / "README.md").read_text()
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["model_type"] == model_type and not {"text_config", "vision_config"} & set(written)
    assert ("per_layer_config" in written) == (masks is RAGGED)
    pruned = assert_computes(tmp_path / "out", text, masks_that_fit(text, masks))
    assert isinstance(pruned, type(text))


def test_prefixes_in_the_newer_order(tmp_path):
    text, ckpt = masked_wrapper(tmp_path / "ckpt", "mistral", {}, RAGGED)
    path = ckpt / "model.safetensors"
    renamed = {
        name.replace("language_model.model.", "model.language_model.").replace(
            "language_model.lm_head", "lm_head"
        ): tensor
        for name, tensor in load_file(path).items()
    }
    save_file(renamed, path, metadata={"format": "pt"})
    assert convert_pruned(ckpt, tmp_path / "out") == 0
    assert_computes(tmp_path / "out", text, RAGGED)


def test_shards_whose_index_names_the_vision_tower(tmp_path):
    text = tiny_model("gemma3_text", 6, 3, 40)
    save_wrapped(tmp_path / "dense", text, max_shard_size="100KB")
    _, ckpt = masked_wrapper(tmp_path / "ckpt", "gemma3_text", {}, RAGGED)
    (ckpt / "model.safetensors").unlink()
    assert convert_pruned(ckpt, tmp_path / "out", "--base-model", tmp_path / "dense") == 0
    assert_computes(tmp_path / "out", text, RAGGED)


@pytest.mark.parametrize("model_type", ["gemma3_text", "ministral3", "qwen3_5_text", "qwen3_5_moe_text"])
@pytest.mark.parametrize("method", ["magnitude", "tyr"])
def test_masks_are_learned_for_the_language_model(tmp_path, method, model_type):
    """tyr changes weights, so that what it writes is a model of text alone already."""
    text, dense, ckpt = tiny_model(model_type, 6, 3, 40), tmp_path / "dense", tmp_path / "ckpt"
    save_wrapped(dense, text)
    byte_tokenizer().save_pretrained(dense)
    (tmp_path / "text.txt").write_text(" ".join(str(i * i % 256) for i in range(3000)))
    options = [
        "--data",
        tmp_path / "text.txt",
        "--calibration-sequences",
        2,
        "--sequence-length",
        32,
        "--iterations",
        0,
    ]
    arguments = ["--method", method, "--device", "cpu", *(options if method == "tyr" else [])]
    assert run(dense, ckpt, *arguments) == 0
    assert convert_pruned(ckpt, tmp_path / "out") == 0
    if method == "magnitude":
        assert_computes(tmp_path / "out", text, load_file(ckpt / "pruning_masks.safetensors"))
    else:
        config, names = json.loads((ckpt / "config.json").read_text()), set(load_file(ckpt / "model.safetensors"))
        assert config["model_type"] == model_type and {name.split(".")[0] for name in names} <= {"model", "lm_head"}


def test_layers_that_draft_are_left_out(tmp_path, capsys):
    text, ckpt = masked_wrapper(tmp_path / "ckpt", "qwen3_5_text", {}, RAGGED)
    edit_weights(ckpt, {"mtp.fc.weight": torch.ones(96, 192), "mtp.layers.0.mlp.up_proj.weight": torch.ones(40, 96)})
    assert convert_pruned(ckpt, tmp_path / "out") == 0
    assert "Layers for multi-token prediction (mtp.*) were left out" in capsys.readouterr().out
    assert_computes(tmp_path / "out", text, masks_that_fit(text, RAGGED))


def test_a_wrapper_without_its_text_is_refused(tmp_path, capsys):
    _, ckpt = masked_wrapper(tmp_path / "ckpt", "mistral", {}, RAGGED)
    edit_json(ckpt / "config.json", text_config=None)
    assert convert_pruned(ckpt, tmp_path / "out") == 2
    assert "text_config, which describes its language model, is missing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
