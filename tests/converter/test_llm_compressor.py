"""The recipe of converter/quantize/README.md: llm-compressor on models that load_pruned loaded.

Runs where llm-compressor is installed; it is in no list of requirements, since it asks for other releases of libraries:

    pip install --no-deps --target llmcompressor llmcompressor==0.14.0.1 compressed-tensors==0.19.0
    PYTHONPATH=llmcompressor python -m pytest tests/converter/test_llm_compressor.py
"""

import os
import random
import string

import pytest
import torch
from helpers.quantized import config_of, quantize_pruned, tensors_of, widened
from helpers.tiny import byte_tokenizer, expert_masks, masks_for, tiny_model, write_masked

from converter import cli
from pruned_vllm.hf.loading import load_pruned

pytest.importorskip("llmcompressor", reason="llm-compressor is not installed")

GROUPS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
CHANNELS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"}
IGNORED = ["lm_head", "re:.*mlp.gate$", "re:.*shared_expert_gate$"]


def gptq(weights: dict) -> list:
    from llmcompressor.modifiers.gptq import GPTQModifier

    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return [GPTQModifier(config_groups=groups, ignore=IGNORED)]


def awq() -> list:
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    groups = {"group_0": {"targets": ["Linear"], "weights": GROUPS}}
    return [AWQModifier(), QuantizationModifier(config_groups=groups, ignore=IGNORED)]


def smoothquant() -> list:
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    return [
        SmoothQuantModifier(smoothing_strength=0.5),
        GPTQModifier(scheme="W8A8", targets=["Linear"], ignore=IGNORED),
    ]


def llama():
    heads = [[1, 0, 2.5, 0, 1, 1], [0, 0, 0, 0.3, 0, 0], [1, 1, 1, 1, 1, -0.5]]
    return tiny_model("llama", 6, 6, 128), masks_for(heads, [torch.arange(128) < width for width in (17, 64, 100)])


def experts():
    model = tiny_model("qwen3_moe", 6, 3, 24)
    return model, expert_masks(model, [[17, 0, 24, 5], [3, 4, 3, 3], [1, 2, 3, 4]])


RECIPES = {
    "GPTQ": (llama, lambda: gptq(GROUPS), ["--scheme", "w4a16"]),
    "GPTQ, experts": (experts, lambda: gptq(CHANNELS), ["--scheme", "w4a16", "--group-size", "channel"]),
    "AWQ": (llama, awq, ["--scheme", "w4a16"]),
    "SmoothQuant": (llama, smoothquant, ["--scheme", "w8a8-int8"]),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_write_the_tensors_that_quantize_pruned_writes(tmp_path, monkeypatch, name):
    from datasets import Dataset
    from llmcompressor import oneshot

    if name == "AWQ" and not torch.accelerator.is_available():
        pytest.skip("llm-compressor's AWQ pins memory, which takes an accelerator")
    make_model, make_recipe, options = RECIPES[name]
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", os.environ.get("TOKENIZERS_PARALLELISM", "false"))
    monkeypatch.chdir(tmp_path)  # it writes logs
    model, masks = make_model()
    ckpt, out = write_masked(tmp_path / "ckpt", model, masks), tmp_path / "out"
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(ckpt)
    assert cli.main([str(ckpt), str(out), "--align", "64" if "experts" not in name else "1"]) == 0
    loaded = load_pruned(out, dtype=torch.float32)
    chance = random.Random(0)
    texts = ["".join(chance.choices(string.ascii_letters, k=64)) for _ in range(16)]  # all experts must get some
    data = Dataset.from_dict({"text": texts})
    oneshot(
        model=loaded,
        processor=tokenizer,
        dataset=data,
        recipe=make_recipe(),
        num_calibration_samples=16,
        max_seq_length=64,
    )
    loaded.save_pretrained(tmp_path / "saved", save_compressed=True)
    assert quantize_pruned(out, tmp_path / "quantized", *options) == 0
    saved, written = tensors_of(tmp_path / "saved"), tensors_of(tmp_path / "quantized")
    layouts = [{key: (tensor.dtype, tensor.shape) for key, tensor in found.items()} for found in (saved, written)]
    assert layouts[0] == layouts[1]
    before, after = config_of(out), config_of(tmp_path / "saved")
    assert after["architectures"] == before["architectures"]
    layers = {index.lstrip("0") or "0": sizes for index, sizes in after["per_layer_config"].items()}
    assert layers == before["per_layer_config"]
    floats, (values, quantized) = tensors_of(out), widened(tmp_path / "saved")
    assert len(quantized) > 10
    if name.startswith("GPTQ"):  # the others move factors from layer to layer
        for tensor in quantized:
            error = (values[tensor] - floats[tensor]).norm() / floats[tensor].norm()
            assert error < 0.5, f"{tensor}: relative error {error}"
