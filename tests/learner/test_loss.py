"""Losses of a part of the tokens at a time: of the model's own logits, and the same with their gradients."""

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import tiny_model

from learner.model import loss

FAMILIES = ["llama", "granite", "gemma3_text", "phi3", "qwen3_5_text", "gpt_oss", "glm4_moe", "qwen3_moe"]
TOKENS = torch.randint(256, (3, 20), generator=torch.Generator().manual_seed(0))
TARGETS = F.pad(TOKENS[:, 1:], (0, 1), value=loss.IGNORED)


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_logits_are_those_of_the_model(model_type):
    model = tiny_model(model_type, 6, 3, 40)
    hidden = loss.run_without_head(model, TOKENS).last_hidden_state
    torch.testing.assert_close(loss.logits_of(model, hidden), model(input_ids=TOKENS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 7, 20, 60, 100])
def test_parts_add_up(monkeypatch, rows):
    model = tiny_model("llama", 6, 3, 40).requires_grad_(False)
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", rows * model.config.vocab_size)
    seen = []

    def loss_of(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        seen.append(len(logits))
        return (F.cross_entropy(logits, targets, ignore_index=loss.IGNORED, reduction="none") * weights).sum()

    hidden = loss.run_without_head(model, TOKENS).last_hidden_state.requires_grad_()
    weights = torch.rand(TOKENS.shape, generator=torch.Generator().manual_seed(1))
    whole = loss_of(model.lm_head(hidden)[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten(), weights[:, :-1].flatten()) / 7
    expected = torch.autograd.grad(whole, hidden)[0]
    seen.clear()
    found = loss.chunked_sum(model, loss_of, hidden, TARGETS, weights) / 7
    assert seen == [min(rows, 60 - start) for start in range(0, 60, rows)]
    torch.testing.assert_close(found, whole)
    torch.testing.assert_close(torch.autograd.grad(found, hidden)[0], expected)
    with torch.no_grad():
        without = loss.chunked_sum(model, loss_of, hidden.detach(), TARGETS, weights) / 7
    torch.testing.assert_close(without, whole)
