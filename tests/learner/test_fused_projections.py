"""Methods on Phi-3, which has one module for q, k and v and one for gate and up: as on a Llama with the parts."""

from dataclasses import replace

import pytest
import torch
from helpers.learning import task_of
from helpers.tiny import HEAD_DIM, expert_masks, tiny_model

from learner.methods import baselines, wanda
from learner.methods.maskprune import learn as maskprune
from learner.model.masking import apply_masks
from learner.settings import MaskPruneSettings, WandaSettings
from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.masked import HEAD_MASK

HEADS, KV_HEADS, WIDTH = 6, 3, 40


def fused_and_parts():
    """A Phi-3, and a Llama that computes the same."""
    fused = tiny_model("phi3", HEADS, KV_HEADS, WIDTH)
    parts = tiny_model("llama", HEADS, KV_HEADS, WIDTH, rms_norm_eps=1e-5)
    weights = fused.state_dict()
    rows = {
        "qkv_proj": ("qkv", [HEADS * HEAD_DIM] + [KV_HEADS * HEAD_DIM] * 2),
        "gate_up_proj": (("gate", "up"), [WIDTH] * 2),
    }
    for name in fused.state_dict():
        module = name.split(".")[-2]
        if module in rows:
            names, sizes = rows[module]
            for part, tensor in zip(names, weights.pop(name).split(sizes), strict=True):
                weights[name.replace(module, f"{part}_proj")] = tensor
    parts.load_state_dict(weights)
    return fused, parts


@pytest.mark.parametrize("site", ["product", "gate_and_up"])
def test_masks_multiply_the_same(site):
    fused, parts = fused_and_parts()
    masks = expert_masks(fused, [], [17, 0, 40]) | {HEAD_MASK.format(1): torch.tensor([1, -2, 0, 3, 0.1, 0])}
    logits = []
    for model in (fused, parts):
        with torch.no_grad(), apply_masks(model, masks, site):
            logits.append(model(torch.arange(40)[None]).logits)
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert (fused(torch.arange(40)[None]).logits - logits[0]).abs().max() > 0.1


METHODS = {
    "magnitude": (baselines.magnitude, None),
    "wanda": (wanda.learn, WandaSettings(calibration_sequences=6, sequence_length=32)),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_the_same_units_stay(name, tied):
    method, settings = METHODS[name]
    fused, parts = (method(task_of(model, settings, tied=tied)).values for model in fused_and_parts())
    assert fused["channel"].sum() == fused["channel"].numel() / 2
    for kind, expected in parts.items():
        assert torch.equal(fused[kind], expected), kind


def test_maskprune_counts_the_same_parameters_and_adapts_fused_projections():
    fused, parts = fused_and_parts()
    settings = MaskPruneSettings(steps=2, batch_size=2, sequence_length=32)
    task = task_of(fused, settings, tied=True)
    counts = [maskprune.kind_parameters(model, task.units) for model in (fused, parts)]
    assert counts[0] == counts[1]
    with pytest.raises(InputError, match="--lora-targets query-value cannot be had: q, k and v are one projection"):
        maskprune.learn(replace(task, settings=replace(settings, lora_targets="query-value")))
    learned = maskprune.learn(task)
    adapted = {name.split(".")[-4] for name, _ in fused.named_parameters() if "lora_A" in name}
    assert adapted == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"} and learned.save_adapter is not None
