"""Models with changed weights: what Transformers refuses to save is refused before the training."""

import json
from pathlib import Path

import pytest
import torch
from helpers.learning import run
from helpers.tiny import byte_tokenizer, converted, masks_for, tiny_model
from safetensors.torch import load_file
from transformers import PreTrainedConfig

from learner.finetune import cli as finetune_cli
from learner.methods.tyr import learn as tyr
from learner.model.saving import check_can_be_saved
from pruned_vllm.hf.loading import load_pruned

TYR = ["--method", "tyr", "--calibration-sequences", 2, "--sequence-length", 32, "--iterations", 0]


def never(*args, **kwargs):
    raise AssertionError("training has begun")


def test_what_cannot_be_saved_is_refused_before_the_training(word_model, tmp_path, monkeypatch, capsys):
    out = converted(tmp_path / "pruned", tiny_model("llama", 6, 6, 40), masks_for([[1, 1, 0, 1, 0, 0]], []))
    byte_tokenizer().save_pretrained(out)

    def refuse(*args, **kwargs):
        raise ValueError("its config is not to Transformers' liking")

    monkeypatch.setattr(PreTrainedConfig, "save_pretrained", refuse)
    monkeypatch.setattr("learner.finetune.distillation.Distillation.train", never)
    monkeypatch.setattr(tyr, "learn", never)
    text, recovered = word_model / "text.txt", tmp_path / "recovered"
    for rank in ("16", "0"):
        arguments = [str(out), str(recovered), "--data", str(text), "--lora-rank", rank, "--device", "cpu"]
        assert finetune_cli.main(arguments) == 2
        assert "could not save" in capsys.readouterr().err and not recovered.exists()
    assert run(word_model / "model", word_model / "ckpt", *TYR, "--data", text) == 2
    assert "could not save" in capsys.readouterr().err and not (word_model / "ckpt").exists()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "mixtral", "qwen3_moe"])
def test_sound_models_can_be_saved(tmp_path, model_type, tied):
    model = tiny_model(model_type, 6, 3, 24, tie_word_embeddings=tied)
    check_can_be_saved(model, "model")
    check_can_be_saved(load_pruned(converted(tmp_path, model, masks_for([[1, 1, 1, 0, 0, 0]], []))), "pruned")


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_config_follows_the_dtype_of_the_weights(word_model, dtype):
    model, ckpt = word_model / "model", word_model / "ckpt"
    assert run(model, ckpt, *TYR, "--data", word_model / "text.txt", "--dtype", dtype) == 0

    def config(directory: Path) -> dict:
        return json.loads((directory / "config.json").read_text())

    stored = "float32" if dtype == "auto" else dtype
    assert config(ckpt) == config(model) | {"dtype": stored}
    assert {tensor.dtype for tensor in load_file(ckpt / "model.safetensors").values()} == {getattr(torch, stored)}
