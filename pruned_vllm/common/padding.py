"""Cutting and zero-padding weights by index; shared by the converter and the tensor-parallel loader."""

from collections.abc import Sequence

import torch

PAD = -1  # in an index of heads or channels: a unit that does not exist, made of zeros


def take_or_zero(tensor: torch.Tensor, dim: int, index: torch.Tensor, fill: int = 0) -> torch.Tensor:
    """`tensor.index_select(dim, index)`, with zeros where the index is PAD.

    Args:
        fill: what stands for zeros in a tensor whose numbers hold several weights each.
    """
    index = index.to(tensor.device)
    padded = index == PAD
    # PyTorch selects and fills in few dtypes of 8 bits; all bits 0 are a zero in each of them.
    bits = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 and tensor.dim() else tensor
    result = bits.index_select(dim, index.clamp(min=0))
    if padded.any():
        result.index_fill_(dim, padded.nonzero().view(-1), fill)
    return result.view(tensor.dtype)


def head_rows(heads: Sequence[int] | torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows [len(heads) * head_dim] of a projection that belong to these heads; those of a head PAD are PAD."""
    index = torch.as_tensor(heads, dtype=torch.long, device="cpu")[:, None]
    rows = index * head_dim + torch.arange(head_dim, device="cpu")
    return torch.where(index == PAD, PAD, rows).view(-1)
