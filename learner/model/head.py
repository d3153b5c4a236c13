"""A causal language model in two parts: its body, which makes hidden states, and its head, which makes logits of them.

Logits of many tokens take much memory, hidden states little. What a head does besides its product (Granite divides the
logits) is in the model's own `forward`, so that runs here too, on hidden states that were made before.
"""

from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import MoeModelOutputWithPast


def hidden_states(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """What the head reads: [sequences, length, hidden_size] for token ids [sequences, length]."""
    return model.model(input_ids=tokens, use_cache=False)[0]


def logits_of(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Logits float32 [tokens, vocabulary] of hidden states [tokens, hidden_size] that `hidden_states` returned."""
    body: nn.Module = model.model
    before = vars(body).get("forward")  # what spreads a model over devices hides the method of the class, too
    body.forward = lambda *args, **kwargs: MoeModelOutputWithPast(last_hidden_state=hidden[None])
    try:
        return model(inputs_embeds=hidden[None], use_cache=False).logits[0].float()
    finally:
        if before is None:
            del body.forward
        else:
            body.forward = before


def watched_hidden_states(wrapped: nn.Module, model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """`hidden_states` of a model inside a wrapper that must see every forward pass, such as DistributedDataParallel."""
    seen: list[torch.Tensor] = []
    handle = model.model.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    try:
        wrapped(input_ids=tokens, use_cache=False, logits_to_keep=1)
    finally:
        handle.remove()
    return seen[0]
