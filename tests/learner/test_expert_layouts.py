"""Experts in a list, as code of a checkpoint holds them, are scored as Transformers' experts in two tensors are."""

import pytest
import torch
from helpers.deepseek import MLP
from helpers.learning import task_of
from helpers.tiny import tiny_model
from torch import nn

from learner.methods import baselines, wanda
from learner.settings import WandaSettings


class Listed(nn.ModuleList):
    """In place of Transformers' experts: the same weights in MLPs."""

    def __init__(self, stacked: nn.Module) -> None:
        super().__init__()
        for gate_up, down in zip(stacked.gate_up_proj, stacked.down_proj, strict=True):
            mlp = MLP(down.shape[0], down.shape[1])
            weights = zip((mlp.gate_proj, mlp.up_proj, mlp.down_proj), (*gate_up.chunk(2), down), strict=True)
            for projection, weight in weights:
                projection.weight = nn.Parameter(weight.clone(), requires_grad=False)
            self.append(mlp)

    def forward(self, tokens: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        result = torch.zeros_like(tokens)
        for index, mlp in enumerate(self):
            token, place = torch.where(chosen == index)
            result[token] += mlp(tokens[token]) * weights[token, place, None]
        return result


def both_layouts():
    stacked, listed = (tiny_model("qwen3_moe", 6, 3, 40, mlp_only_layers=[0]) for _ in range(2))
    for layer in listed.model.layers[1:]:
        layer.mlp.experts = Listed(layer.mlp.experts)
    with torch.no_grad():
        tokens = torch.arange(40)[None]
        torch.testing.assert_close(listed(tokens).logits, stacked(tokens).logits, rtol=1e-4, atol=1e-4)
    return stacked, listed


METHODS = {
    "magnitude": (baselines.magnitude, None),
    "wanda": (wanda.learn, WandaSettings(calibration_sequences=6, sequence_length=32)),
}


@pytest.mark.parametrize("name", METHODS)
def test_masks_are_the_same(name):
    method, settings = METHODS[name]
    stacked, listed = (method(task_of(model, settings)).values for model in both_layouts())
    assert listed["expert"].sum() == listed["expert"].numel() / 2
    for kind, expected in stacked.items():
        assert torch.equal(listed[kind], expected), kind


def test_wanda_gives_the_same_scores():
    settings = WandaSettings(calibration_sequences=6, sequence_length=32)
    stacked, listed = (wanda.scores(task_of(model, settings)) for model in both_layouts())
    for kind, expected in stacked.items():
        torch.testing.assert_close(listed[kind], expected, rtol=1e-4, atol=0, msg=kind)
