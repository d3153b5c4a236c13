"""Cutting and zero-padding weights by index; shared by the converter and the tensor-parallel loader."""

from collections.abc import Sequence

import torch

PAD = -1  # in an index of heads or channels: a unit that does not exist, made of zeros


def take_or_zero(tensor: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
    """`tensor.index_select(dim, index)`, with zeros where the index is PAD."""
    index = index.to(tensor.device)
    padded = index == PAD
    result = tensor.index_select(dim, index.clamp(min=0))
    if padded.any():
        result.index_fill_(dim, padded.nonzero().view(-1), 0)
    return result


def head_rows(heads: Sequence[int] | torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows [len(heads) * head_dim] of a projection that belong to these heads; those of a head PAD are PAD."""
    index = torch.as_tensor(heads, dtype=torch.long, device="cpu")[:, None]
    rows = index * head_dim + torch.arange(head_dim, device="cpu")
    return torch.where(index == PAD, PAD, rows).view(-1)
