"""Routers of mixture-of-experts models: training that keeps all experts in use, and how evenly they are used."""

import torch
from transformers import PreTrainedModel

from learner.model.perplexity import EVAL_BLOCK_SIZE


def balancing_loss(router_logits: tuple[torch.Tensor, ...], chosen: int) -> torch.Tensor:
    """Transformers' load-balancing loss of each layer, logits [tokens, experts], averaged over the layers.

    It is lowest, and equal to `chosen`, the number of experts of a token, when all experts get as many tokens.
    With `router_aux_loss_coef` Transformers takes all layers together instead. Training then left experts without any
    token, since an idle expert of one layer was made up for by a busy one with the same index in another layer.
    """
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    losses = [load_balancing_loss_func((logits,), logits.shape[-1], chosen) for logits in router_logits]
    return torch.stack(losses).mean()


@torch.no_grad()
def expert_load(model: PreTrainedModel, token_ids: torch.Tensor) -> list[list[float]]:
    """The share of the routed tokens that goes to each expert, by layer that has experts; a layer's add up to 1.

    `token_ids` [N] are read in the blocks that `learner.model.perplexity.perplexity` scores.
    """
    chosen = model.config.num_experts_per_tok
    blocks = token_ids[: len(token_ids) // EVAL_BLOCK_SIZE * EVAL_BLOCK_SIZE].view(-1, EVAL_BLOCK_SIZE)
    by_batch = []  # tokens of each expert [layers, experts]
    for batch in blocks.to(next(model.parameters()).device).split(16):
        router_logits = model(input_ids=batch, output_router_logits=True).router_logits  # by layer [tokens, experts]
        experts = [logits.topk(chosen, dim=-1).indices.flatten() for logits in router_logits]
        by_batch.append(
            torch.stack(
                [ids.bincount(minlength=logits.shape[-1]) for ids, logits in zip(experts, router_logits, strict=True)]
            )
        )
    counts = torch.stack(by_batch).sum(0)
    return (counts.double() / counts.sum(1, keepdim=True)).tolist()


def describe_load(load: list[list[float]]) -> str:
    """Lines for a terminal, the loads in per cent."""
    lines = [f"  tokens that each expert gets, in % (even: {100 / len(load[0]):.2f})"]
    lines += [f"    layer {i}: " + " ".join(f"{100 * share:5.2f}" for share in layer) for i, layer in enumerate(load)]
    return "\n".join(lines)
