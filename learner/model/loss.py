"""From hidden states to losses of the next token, a part of the tokens at a time.

All logits of a batch at once would often be the largest tensors of a step: 16 sequences of 2048 tokens with a
vocabulary of 150,000 are 20 GB in float32, and a loss needs several of that size. Here a model is run without its
lm_head; `chunked_sum` makes the logits of some tokens, of teacher and student, their loss and its gradient, and drops
them before it goes on. So nothing is computed twice.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from learner.memory import LOGITS_AT_ONCE

IGNORED = -100  # target of a token that none follows


def run_without_head(
    model: PreTrainedModel, tokens: torch.Tensor, wrapped: nn.Module | None = None, **options: Any
) -> Any:
    """What the decoder of a ...ForCausalLM returns for token ids [sequences, length]; see `chunked_sum`.

    Args:
        wrapped: `model` in a wrapper that must see every forward pass, such as DistributedDataParallel.
        options: of its forward pass, such as output_hidden_states.
    """
    outermost: Any = model if wrapped is None else wrapped
    if outermost is model and not isinstance(model, FSDPModule):
        return outermost.model(input_ids=tokens, use_cache=False, **options)
    # Sharded weights are gathered when the outermost module is called, those of lm_head too.
    found: list[Any] = []
    handle = model.model.register_forward_hook(lambda module, args, output: found.append(output))
    try:
        outermost(input_ids=tokens, use_cache=False, logits_to_keep=1, **options)
    finally:
        handle.remove()
    return found[0]


def logits_of(model: PreTrainedModel, hidden_states: torch.Tensor) -> torch.Tensor:
    """Logits float32 [..., vocabulary] of what `run_without_head` leaves, [..., hidden_size]."""
    # Not by calling the module: where it is sharded, it is whole since `run_without_head`, and its hooks would begin
    # another pass.
    return scaled(model, model.lm_head.forward(hidden_states).float())


def scaled(model: PreTrainedModel, logits: torch.Tensor) -> torch.Tensor:
    """What the model makes of the output of its lm_head."""
    has_scale = hasattr(type(model.config), "logits_scaling")  # Granite; a key of that name means nothing elsewhere
    return logits / model.config.logits_scaling if has_scale else logits


@dataclass(frozen=True)
class Teacher:
    """What a model is to say like.

    Attributes:
        model: whose head makes logits of `hidden_states` [sequences, length, hidden_size].
        weight: of KL(teacher || model) beside the cross-entropy.
        temperature: by which both divide their logits for it; its square multiplies it.
    """

    model: PreTrainedModel
    hidden_states: torch.Tensor
    weight: float
    temperature: float = 1.0


def next_token_loss(
    model: PreTrainedModel, tokens: torch.Tensor, hidden_states: torch.Tensor, teacher: Teacher | None = None
) -> torch.Tensor:
    """Cross-entropy, the mean over the predicted tokens, and where there is a teacher its weight times KL(teacher ||
    model), the mean over all tokens. NaN for sequences of one token, which predict none.

    Args:
        tokens: ids [sequences, length].
        hidden_states: of `model`, [sequences, length, hidden_size].
    """
    number, predicted = tokens.numel(), tokens[:, 1:].numel()
    ce_weight = number / predicted if predicted else math.nan

    def loss_of(logits: torch.Tensor, targets: torch.Tensor, *taught: torch.Tensor) -> torch.Tensor:
        if teacher is None:
            return ce_weight * F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
        with torch.no_grad():
            wanted = logits_of(teacher.model, *taught)
        return _Distillation.apply(logits, wanted, targets, ce_weight, teacher.weight, teacher.temperature)

    targets = F.pad(tokens[:, 1:], (0, 1), value=IGNORED)
    taught = [] if teacher is None else [teacher.hidden_states]
    return chunked_sum(model, loss_of, hidden_states, targets, *taught) / number


def chunked_sum(
    model: PreTrainedModel,
    loss_of: Callable[..., torch.Tensor],
    hidden_states: torch.Tensor,
    *others: torch.Tensor,
) -> torch.Tensor:
    """Sum over tokens of a loss; gradients flow into `hidden_states`, and into lm_head where that is trained.

    Args:
        model: whose lm_head it is.
        loss_of: sum of the loss of some tokens, given their logits [tokens, vocabulary] and their part of `others`. To
            divide by their number is better done with the result: gradients of a mean may be too small for float16.
        hidden_states: [sequences, length, hidden_size].
        others: [sequences, length, ...].
    """
    rows = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    # With layers on several devices, the tokens are on the first of them and the hidden states on the last.
    flat = [tensor.flatten(0, 1).to(hidden_states.device) for tensor in (hidden_states, *others)]
    if not hidden_states.requires_grad:
        parts = zip(*(tensor.split(rows) for tensor in flat), strict=True)
        return torch.stack([loss_of(logits_of(model, first), *rest) for first, *rest in parts]).sum()
    trained = [parameter for parameter in model.lm_head.parameters() if parameter.requires_grad]
    return _ChunkedSum.apply(
        lambda hidden, *rest: loss_of(logits_of(model, hidden), *rest), rows, flat[1:], flat[0], *trained
    )


class _ChunkedSum(torch.autograd.Function):
    """The backward pass of every part follows its forward pass at once, so that its logits can go."""

    @staticmethod
    def forward(
        ctx: Any, loss_of: Any, rows: int, others: Sequence[torch.Tensor], flat: torch.Tensor, *trained: torch.Tensor
    ) -> torch.Tensor:
        gradient, total = torch.empty_like(flat), torch.zeros((), device=flat.device)
        of_trained = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in trained]
        parts = zip(*(tensor.split(rows) for tensor in (flat, gradient, *others)), strict=True)
        for hidden, into, *rest in parts:
            with torch.enable_grad():
                leaf = hidden.detach().requires_grad_()
                loss = loss_of(leaf, *rest)
            of_hidden, *more = torch.autograd.grad(loss, (leaf, *trained))
            into.copy_(of_hidden)
            for summed, part in zip(of_trained, more, strict=True):
                summed += part
            total += loss.detach()
        ctx.save_for_backward(gradient, *of_trained)
        return total

    @staticmethod
    def backward(ctx: Any, output_gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, None, *(gradient * output_gradient for gradient in ctx.saved_tensors)


class _Distillation(torch.autograd.Function):
    """Sum over tokens of ce_weight CE + kl_weight T^2 KL(wanted || student), with targets that may be IGNORED.

    Its gradient in the student's logits l is made along with it,

        ce_weight (softmax(l) - target) + kl_weight T (softmax(l / T) - softmax(wanted / T))

    because autograd would go over twice as many tensors of the size of the logits, which takes as long as a good part
    of the model.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        wanted: torch.Tensor,
        targets: torch.Tensor,
        ce_weight: float,
        kl_weight: float,
        temperature: float,
    ) -> torch.Tensor:
        student = logits.log_softmax(-1)
        is_predicted = targets != IGNORED
        rows, columns = is_predicted.nonzero().view(-1), targets[is_predicted]
        loss = -ce_weight * student[rows, columns].sum()
        softened = student if temperature == 1 else (logits / temperature).log_softmax(-1)
        teacher = (wanted if temperature == 1 else wanted / temperature).log_softmax(-1)
        probabilities = teacher.exp()
        loss = loss + kl_weight * temperature**2 * teacher.sub_(softened).mul_(probabilities).sum()
        if temperature == 1:
            gradient = student.exp_().mul_(ce_weight * is_predicted[:, None] + kl_weight)
            gradient.sub_(probabilities, alpha=kl_weight)
        else:
            gradient = student.exp_().mul_(ce_weight * is_predicted[:, None])
            gradient.add_(softened.exp_().sub_(probabilities), alpha=kl_weight * temperature)
        gradient[rows, columns] -= ce_weight
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, output_gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.saved_tensors[0] * output_gradient, None, None, None, None, None


class ReverseDivergence(torch.autograd.Function):
    """Sum over tokens of KL(student || wanted), given the logits of both; made as `_Distillation` is.

    Its gradient in the student's logits is  p (log p - log q - KL of the token), p the student's probabilities.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        student, teacher = logits.log_softmax(-1), wanted.log_softmax(-1)
        difference = torch.sub(student, teacher, out=teacher)
        probabilities = student.exp_()
        gradient = difference.mul_(probabilities)
        of_tokens = gradient.sum(-1, keepdim=True)
        ctx.save_for_backward(gradient.addcmul_(probabilities, of_tokens, value=-1))
        return of_tokens.sum()

    @staticmethod
    def backward(ctx: Any, output_gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.saved_tensors[0] * output_gradient, None
