"""The loss of next tokens in parts against the whole loss by autograd: values, and gradients of model and head."""

import pytest
import torch
from helpers.losses import cross_entropy, divergence
from helpers.tiny import tiny_model

from learner.model import loss
from learner.model.loss import Teacher, next_token_loss, run_without_head

TOKENS = torch.randint(256, (3, 7), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("rows", [1, 4, 21, 100])
@pytest.mark.parametrize(("weight", "temperature"), [(0.0, 1.0), (3.0, 1.0), (3.0, 2.0)])
@pytest.mark.parametrize("tied", [True, False])
def test_parts_make_the_whole(rows, weight, temperature, tied, monkeypatch):
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", rows * 256)
    dense = tiny_model("granite", 6, 3, 40, seed=1)
    whole, parts = (tiny_model("granite", 6, 3, 40, tie_word_embeddings=tied) for _ in range(2))
    for model in (whole, parts):
        model.requires_grad_(True)
    logits, teacher = whole(TOKENS).logits, None
    expected = cross_entropy(logits, TOKENS)
    if weight:
        with torch.no_grad():
            dense_logits, wanted = dense(TOKENS).logits, run_without_head(dense, TOKENS).last_hidden_state
        divided = (dense_logits / temperature, logits / temperature)
        expected = expected + weight * temperature**2 * divergence(*divided)
        teacher = Teacher(dense, wanted, weight, temperature)
    (5 * expected).backward()
    found = next_token_loss(parts, TOKENS, run_without_head(parts, TOKENS).last_hidden_state, teacher)
    (5 * found).backward()  # as gradients of several forward passes are averaged
    torch.testing.assert_close(found, expected)
    for (key, ours), theirs in zip(parts.named_parameters(), whole.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5), key


def test_one_token_predicts_none():
    model = tiny_model("llama", 6, 3, 40)
    assert next_token_loss(model, TOKENS[:, :1], run_without_head(model, TOKENS[:, :1]).last_hidden_state).isnan()
