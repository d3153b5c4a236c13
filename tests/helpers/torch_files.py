"""Files that torch.save writes, in both of its formats."""

import torch

FORMATS = {"zip": {}, "legacy": {"_use_new_zipfile_serialization": False}}
FLOATS = torch.linspace(-3, 3, 24).view(4, 6)


def saved(path, content, container: str):
    torch.save(content, path, **FORMATS[container])
    return path


def same_bits(tensor: torch.Tensor, expected: torch.Tensor) -> None:
    expected = expected.detach().as_subclass(torch.Tensor)
    assert type(tensor) is torch.Tensor and not tensor.requires_grad
    assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape)
    assert tensor.stride() == expected.stride() or not tensor.numel()
    assert tensor.contiguous().view(-1).view(torch.uint8).equal(expected.contiguous().view(-1).view(torch.uint8))
