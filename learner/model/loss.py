"""From hidden states to losses of the next token, a part of the tokens at a time.

All logits of a batch at once would often be the largest tensors of a step: 16 sequences of 2048 tokens with a
vocabulary of 150,000 are 20 GB in float32, and a loss needs several of that size. Here a model is run without its
lm_head; `chunked_sum` makes the logits of some tokens, of teacher and student, their loss and its gradient, and drops
them before it goes on. As lm_head is frozen, nothing is computed twice.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

LOGITS_AT_ONCE = 1 << 26  # tokens times vocabulary: 256 MiB in float32, of which a loss needs about five
IGNORED = -100  # target of a token that none follows


def run_without_head(model: PreTrainedModel, tokens: torch.Tensor, **options: Any) -> Any:
    """What the decoder of a ...ForCausalLM returns for token ids [sequences, length]; see `chunked_sum`.

    Args:
        options: of its forward pass, such as output_hidden_states.
    """
    if not isinstance(model, FSDPModule):
        return model.model(input_ids=tokens, use_cache=False, **options)
    # Sharded weights are gathered when the outermost module is called, those of lm_head too.
    found: list[Any] = []
    handle = model.model.register_forward_hook(lambda module, args, output: found.append(output))
    try:
        model(input_ids=tokens, use_cache=False, logits_to_keep=1, **options)
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


def next_tokens(tokens: torch.Tensor) -> torch.Tensor:
    """Targets of token ids [sequences, length]: the next token, and IGNORED for the last."""
    return F.pad(tokens[:, 1:], (0, 1), value=IGNORED)


def chunked_sum(
    model: PreTrainedModel,
    loss_of: Callable[..., torch.Tensor],
    hidden_states: torch.Tensor,
    *others: torch.Tensor,
) -> torch.Tensor:
    """Sum over tokens of a loss; gradients flow into `hidden_states` alone.

    Args:
        model: whose lm_head is frozen.
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
    return _ChunkedSum.apply(flat[0], flat[1:], rows, lambda hidden, *rest: loss_of(logits_of(model, hidden), *rest))


class _ChunkedSum(torch.autograd.Function):
    """The backward pass of every part follows its forward pass at once, so that its logits can go."""

    @staticmethod
    def forward(ctx: Any, flat: torch.Tensor, others: list[torch.Tensor], rows: int, loss_of: Any) -> torch.Tensor:
        gradient, total = torch.empty_like(flat), torch.zeros((), device=flat.device)
        parts = zip(*(tensor.split(rows) for tensor in (flat, gradient, *others)), strict=True)
        for hidden, into, *rest in parts:
            with torch.enable_grad():
                leaf = hidden.detach().requires_grad_()
                loss = loss_of(leaf, *rest)
            into.copy_(torch.autograd.grad(loss, leaf)[0])
            total += loss.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, output_gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.saved_tensors[0] * output_gradient, None, None, None
