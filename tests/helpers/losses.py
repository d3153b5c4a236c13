"""Losses as the papers print them, of all logits at once."""

import torch
import torch.nn.functional as F


def cross_entropy(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of tokens [batch, length] given logits [batch, length, vocabulary]."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def divergence(teacher: torch.Tensor, student: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """KL(teacher || student) of logits [batch, length, vocabulary], mean over tokens, times temperature squared."""
    teacher, student = (
        F.log_softmax(logits.flatten(0, 1).float() / temperature, dim=-1) for logits in (teacher, student)
    )
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
