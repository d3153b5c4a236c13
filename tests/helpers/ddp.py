"""What DDP writes: trainable_params.pt with the masks that it learned."""

import torch

from pruned_vllm.formats.masked import CHANNEL_MASK, EXPERT_MASK, HEAD_MASK

KEYS = {"head": HEAD_MASK, "intermediate": CHANNEL_MASK, "expert": EXPERT_MASK}


def log_alphas(*shape: int, seed: int = 0) -> torch.Tensor:
    """About half of them are negative, which removes the unit; others are up to 8."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).mul(2).clamp(-3, 8)


def trainable_params(masks: dict[str, torch.Tensor], prefix: str = "module.") -> dict[str, torch.Tensor]:
    """What DDP saves: the masks, and the multipliers of its loss."""
    content = {}
    for kind, values in masks.items():
        content[f"{prefix}l0_module.masks.{kind}.z_loga"] = torch.nn.Parameter(values)
        for number in (1, 2):
            content[f"{prefix}l0_module.lambdas.lambda_{number}_{kind}"] = torch.nn.Parameter(torch.full((1,), 0.3))
    return content
