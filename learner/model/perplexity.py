"""Perplexity of a causal language model on a stream of tokens."""

import torch
import torch.nn.functional as F
from torch import nn

EVAL_BLOCK_SIZE = 128  # tokens; DDP's tables use it, most other papers 2048: figures of the two cannot be compared


@torch.no_grad()
def perplexity(model: nn.Module, token_ids: torch.Tensor, block_size: int = EVAL_BLOCK_SIZE) -> float:
    """exp of the mean negative log-likelihood of `token_ids` [N], N at least `block_size`.

    The stream is cut into blocks of `block_size` tokens that see nothing of each other; the first token of a block is
    context only, and the remainder is dropped.
    """
    device = next(model.parameters()).device
    blocks = token_ids[: len(token_ids) // block_size * block_size].view(-1, block_size)
    total = 0.0
    for batch in blocks.to(device).split(16):
        logits = model(input_ids=batch).logits.float()
        total += F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    mean = torch.tensor(total / (len(blocks) * (block_size - 1)), dtype=torch.float64)
    return mean.exp().item()  # infinite where math.exp raises
