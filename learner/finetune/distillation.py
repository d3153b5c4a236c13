"""The Trainer of fine-tuning and its loss, in pieces of the text: never all logits at once, and none of them twice.

A batch of 16 x 2048 tokens and a vocabulary of 128,000 make 17 GB of logits in float32, of each model, and their
gradients as much again. Here the heads run on some tokens at a time; the gradient of the hidden states is computed
right there, in the forward pass, and the logits go. So nothing is computed again in the backward pass.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, Trainer

from learner.model.head import hidden_states, logits_of, watched_hidden_states
from pruned_vllm.common.errors import InputError

CHUNK_ELEMENTS = 1 << 26  # logits of a model at once: 256 MB in float32


class Distillation(Trainer):
    """CE, and with a teacher CE + kd_weight * KL(teacher || model), of token ids "input_ids"."""

    loss_is_scaled_for_ga = False  # the loss is the mean over a micro batch

    def __init__(self, *, teacher: PreTrainedModel | None, kd_weight: float, **kwargs) -> None:
        super().__init__(**kwargs)
        self._teacher, self._kd_weight = teacher, kd_weight

    def compute_loss(self, model: nn.Module, inputs: dict[str, torch.Tensor], *args, **kwargs) -> torch.Tensor:
        tokens = inputs["input_ids"]
        pruned = self.accelerator.unwrap_model(model)
        pruned = pruned.get_base_model() if isinstance(pruned, PeftModel) else pruned
        # Through `model`, which adds up gradients of several processes.
        hidden = watched_hidden_states(model, pruned, tokens)
        taught: dict[str, Any] = {}
        if (dense := self._teacher) is not None:
            with torch.no_grad():
                theirs = hidden_states(dense, tokens)
            taught = {"teacher": partial(logits_of, dense), "teacher_hidden": theirs, "kd_weight": self._kd_weight}
        head = pruned.get_output_embeddings().parameters()
        loss = distillation_loss(
            partial(logits_of, pruned),
            hidden,
            tokens,
            pruned.config.vocab_size,
            head_parameters=[parameter for parameter in head if parameter.requires_grad],
            **taught,
        )
        if not loss.isfinite():
            raise InputError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}; lower --learning-rate, use --dtype "
                "bfloat16 or float32, or a --sequence-length of at least 2"
            )
        return loss


def distillation_loss(
    head: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    tokens: torch.Tensor,
    vocabulary: int,
    *,
    head_parameters: Sequence[torch.Tensor] = (),
    teacher: Callable[[torch.Tensor], torch.Tensor] | None = None,
    teacher_hidden: torch.Tensor | None = None,
    kd_weight: float = 0.0,
) -> torch.Tensor:
    """CE + kd_weight * KL(teacher || model): means over the predicted tokens and over all tokens.

    Args:
        head: logits float32 [n, vocabulary] of hidden states [n, hidden_size].
        hidden: of the model, [sequences, length, hidden_size]; gradients flow into it.
        tokens: ids [sequences, length].
        head_parameters: of `head`, that are trained.
        teacher, teacher_hidden: the same of the teacher; None for CE alone.
    """
    targets = F.pad(tokens[:, 1:], (0, 1), value=-100).flatten()  # the last token of a sequence predicts nothing
    predicted = max(1, int((targets >= 0).sum()))
    theirs = None if teacher_hidden is None else teacher_hidden.flatten(0, 1)

    def loss_of(part: torch.Tensor, place: slice) -> torch.Tensor:
        logits = head(part)
        loss = F.cross_entropy(logits, targets[place], reduction="sum", ignore_index=-100) / predicted
        if teacher is None or theirs is None:
            return loss
        with torch.no_grad():
            wanted = teacher(theirs[place]).log_softmax(-1)
        divergence = F.kl_div(logits.log_softmax(-1), wanted, reduction="sum", log_target=True)
        return loss + kd_weight * divergence / len(targets)

    step = max(1, CHUNK_ELEMENTS // vocabulary)
    return _InPieces.apply(loss_of, step, hidden.flatten(0, 1), *head_parameters)


class _InPieces(torch.autograd.Function):
    """The sum of `loss_of(rows, place)` over pieces of `step` rows, with gradients of the rows and of parameters."""

    @staticmethod
    def forward(ctx, loss_of: Callable, step: int, rows: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        total, gradient = torch.zeros((), device=rows.device), torch.empty_like(rows)
        of_parameters = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
        for start in range(0, len(rows), step):
            place = slice(start, start + step)
            with torch.enable_grad():
                part = rows[place].detach().requires_grad_()
                loss = loss_of(part, place)
                gradient[place], *more = torch.autograd.grad(loss, (part, *parameters))
            for summed, one in zip(of_parameters, more, strict=True):
                summed += one
            total += loss.detach()
        ctx.save_for_backward(gradient, *of_parameters)
        return total

    @staticmethod
    def backward(ctx, scale: torch.Tensor):
        gradient, *of_parameters = ctx.saved_tensors
        return None, None, gradient * scale, *(one * scale for one in of_parameters)
