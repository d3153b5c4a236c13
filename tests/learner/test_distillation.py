"""The loss in pieces against the whole loss by autograd: values, and gradients of hidden states and of the head."""

from functools import partial

import pytest
import torch
from helpers.tiny import tiny_model

from learner.finetune import distillation
from learner.finetune.distillation import distillation_loss
from learner.model.head import hidden_states, logits_of
from learner.run.training import cross_entropy, divergence

TOKENS = torch.randint(256, (3, 7), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("piece", [1, 4, 21, 100])
@pytest.mark.parametrize("kd_weight", [0.0, 3.0])
@pytest.mark.parametrize("tied", [True, False])
def test_pieces_make_the_whole(piece, kd_weight, tied, monkeypatch):
    monkeypatch.setattr(distillation, "CHUNK_ELEMENTS", piece * 256)
    teacher = tiny_model("granite", 6, 3, 40, seed=1)
    whole, pieces = (tiny_model("granite", 6, 3, 40, tie_word_embeddings=tied) for _ in range(2))
    for model in (whole, pieces):
        model.requires_grad_(True)
    logits = whole(TOKENS).logits
    expected = cross_entropy(logits, TOKENS)
    taught = {}
    if kd_weight:
        with torch.no_grad():
            logits_of_teacher, theirs = teacher(TOKENS).logits, hidden_states(teacher, TOKENS)
        expected = expected + kd_weight * divergence(logits_of_teacher, logits)
        taught = {"teacher": partial(logits_of, teacher), "teacher_hidden": theirs, "kd_weight": kd_weight}
    (5 * expected).backward()
    sizes = []

    def head(hidden):
        sizes.append(len(hidden))
        return logits_of(pieces, hidden)

    hidden, head_parameters = hidden_states(pieces, TOKENS), list(pieces.lm_head.parameters())
    loss = distillation_loss(head, hidden, TOKENS, 256, head_parameters=head_parameters, **taught)
    (5 * loss).backward()  # as gradients of several forward passes are averaged
    assert max(sizes) <= piece and sum(sizes) == TOKENS.numel()
    torch.testing.assert_close(loss, expected)
    for (key, ours), theirs in zip(pieces.named_parameters(), whole.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5), key
