"""What no mask and no tensor that is merged may hold, in whatever format it came."""

import torch

from pruned_vllm.formats.family import Family


def not_finite(*tensors: torch.Tensor, name: str = "") -> str | None:
    """How many of all values (of `name`) are NaN or infinite, in words; None where all are finite."""
    bad, count = sum(int((~tensor.isfinite()).sum()) for tensor in tensors), sum(map(torch.numel, tensors))
    return f"{bad:,} of {count:,} values{name and f' of {name}'} are NaN or infinite" if bad else None


def lost_heads(head_mask: torch.Tensor, family: Family) -> str | None:
    """Why heads whose mask is 0 cannot go from a model of this family; None where they can, or where all go or none."""
    removed = int((head_mask == 0).sum())
    if family.why_heads_stay is None or removed in (0, head_mask.numel()):
        return None
    return (
        f"{removed} of {head_mask.numel()} heads have a mask of 0, but {family.architecture} {family.why_heads_stay}; "
        "prune the experts alone"
    )
