"""What each method learns, through convert-pruned and vLLM: the tokens and log-probabilities of the masked model."""

import json

import pytest
import torch
from helpers.serving import assert_serves_the_masked_model
from helpers.tiny import byte_tokenizer, tiny_model
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from converter.convert import convert
from converter.plan import make_plan
from learner import cli

TRAINING = ["--steps", 40, "--batch-size", 2, "--sequence-length", 32]
SEARCH = [
    "--calibration-sequences",
    8,
    "--sequence-length",
    32,
    "--iterations",
    2,
    "--generations",
    2,
    "--offspring",
    4,
    "--selection-tokens",
    256,
]
METHODS = {
    "ddp": [*TRAINING, "--lambda2-learning-rate", 4],
    "maskprune": TRAINING,
    "tyr": SEARCH,
}
CASES = [(method, model_type) for method in METHODS for model_type in ("qwen3", "qwen3_moe")]
FAST = [("ddp", "qwen3"), ("maskprune", "qwen3_moe"), ("tyr", "qwen3")]  # the others are slow tests


@pytest.mark.parametrize(
    ("method", "model_type"), [case if case in FAST else pytest.param(*case, marks=pytest.mark.slow) for case in CASES]
)
def test_served_model_is_the_learned_model(tmp_path, method, model_type):
    dense, text, ckpt, out = (tmp_path / name for name in ("dense", "text.txt", "ckpt", "out"))
    tiny_model(model_type, 6, 3, 40).save_pretrained(dense)
    byte_tokenizer().save_pretrained(dense)
    text.write_text(" ".join(str(i * i % 256) for i in range(3000)))
    arguments = [dense, ckpt, "--method", method, "--data", text, *METHODS[method]]
    assert cli.main([str(argument) for argument in arguments]) == 0
    convert(make_plan(ckpt), out)

    written = json.loads((ckpt / "pruning.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(written["base_model"] or ckpt, dtype=torch.float32)
    if written["lora_adapter"]:
        model = PeftModel.from_pretrained(model, ckpt / written["lora_adapter"]).merge_and_unload()
    masks = load_file(ckpt / "pruning_masks.safetensors")
    assert any((mask == 0).any() for mask in masks.values()), "nothing was pruned"
    stock = json.loads((out / "config.json").read_text())["architectures"] == [type(model).__name__]
    assert stock == (method == "maskprune"), "MaskPrune's widths are uniform, so that its result is a stock model"
    assert_serves_the_masked_model(out, model.eval(), masks, written["channel_mask_site"])
