"""Perplexity of a causal language model on a stream of tokens."""

import torch
import torch.nn.functional as F
from torch import nn

from pruned_vllm.common.progress import progress_bar

BATCH_SIZE = 16  # blocks
EVAL_BLOCK_SIZE = 128  # tokens, as in DDP's tables; figures with other sizes (most papers: 2048) cannot be compared


@torch.no_grad()
def perplexity(
    model: nn.Module,
    token_ids: torch.Tensor,
    block_size: int = EVAL_BLOCK_SIZE,
    *,
    title: str = "perplexity",
    show_progress: bool = False,
    device: torch.device | None = None,
) -> float:
    """exp of the mean negative log-likelihood of `token_ids` [N], N at least `block_size`.

    The stream is cut into blocks of `block_size` tokens that see nothing of each other; the first token of a block is
    context only, and the remainder is dropped. `title` is that of the progress bar. `device` is where the model
    computes; None is where its weights are.
    """
    device = device or next(model.parameters()).device
    blocks = token_ids[: len(token_ids) // block_size * block_size].view(-1, block_size)
    total = 0.0
    batches = blocks.split(BATCH_SIZE)
    for batch in progress_bar(batches, desc=title, unit="batch", disable=not show_progress):
        batch = batch.to(device)
        logits = model(input_ids=batch).logits.float()
        total += F.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten().to(logits.device), reduction="sum"
        ).item()
    mean = torch.tensor(total / (len(blocks) * (block_size - 1)), dtype=torch.float64)
    return mean.exp().item()  # math.exp would raise where this is infinite
