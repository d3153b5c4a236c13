"""Cuts hidden dimensions: which stay, and what every tensor is multiplied by along them.

The hidden states enter by the embedding, and attention and MLP add to them through o_proj and down_proj. A dimension
into which none of these puts anything is zero everywhere, so it can go. Why the rest is exact, with z the masks:

- z of the embedding goes into its columns; lm_head, also where it was tied, keeps the values without z
- z of the outputs goes into the rows of o_proj and down_proj and into their biases
- z of the norms goes into the norms' weights
- RMSNorm of D dimensions is x / sqrt(sum(x^2) / K + eps) * w with K = D. With another K in training, or another D
  after the cut, w sqrt(K / D) and eps K / D compute what K and eps computed. The dimensions that went were zeros, and
  those that are added as padding are, so the sum stays what it was.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from converter.fold import Cut
from converter.source import HiddenMask
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.padding import PAD
from pruned_vllm.formats.geometry import ModelGeometry

EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
_OUTPUTS = (".o_proj.", ".down_proj.", ".w2.")
_HEAD_NORMS = (".q_norm.weight", ".k_norm.weight")


@dataclass(frozen=True)
class HiddenCut:
    """What happens to the hidden dimensions of a model.

    Attributes:
        kept: indices of the dimensions that stay, PAD for dimensions of zeros.
        exact_size: how many stay, without padding.
        embedding, outputs, norms: float32, one factor for each index of `kept`; None is 1.
        rms_norm_eps: the new value; None where it stays.
    """

    kept: torch.Tensor
    exact_size: int
    embedding: torch.Tensor | None
    outputs: torch.Tensor | None
    norms: torch.Tensor | None
    rms_norm_eps: float | None

    @property
    def hidden_size(self) -> int:
        return len(self.kept)

    def cut(self, name: str, shape: tuple[int, ...], inner: Cut | None) -> Cut:
        """The cut of one tensor.

        Args:
            name, shape: of the tensor.
            inner: its cut along the other dimension, that of heads and channels.
        """
        inner = inner or Cut()
        if name == EMBEDDING:
            return replace(inner, columns=self.kept, column_factors=self.embedding)
        if name.endswith(_HEAD_NORMS):
            return inner
        if is_output(name):
            return replace(inner, rows=self.kept, row_factors=self.outputs)
        if len(shape) == 2:
            return replace(inner, columns=self.kept)
        if name.endswith(".bias"):
            return inner
        return replace(inner, rows=self.kept, row_factors=self.norms)


def is_output(name: str) -> bool:
    """Whether a tensor is (the bias of) a projection that adds to the hidden states."""
    return any(part in name for part in _OUTPUTS)


def make_hidden_cut(
    mask: HiddenMask, dense: ModelGeometry, config: Mapping[str, Any], alignment: int
) -> HiddenCut | None:
    """What a mask leaves of the hidden dimensions, padded to a size that can be served; None changes nothing.

    Args:
        config: of the model, for rms_norm_eps.
        alignment: the hidden size becomes a multiple of this, at most the one before.

    Raises:
        InputError: no dimension is left, or the norms cannot be made right.
    """
    size = dense.hidden_size
    for factors in (mask.embedding, mask.outputs, mask.norms):
        if factors is not None and factors.shape != (size,):
            raise InputError(f"the hidden mask has shape {list(factors.shape)}, the model needs [{size}]")
    kept = _used_dimensions(mask, size)
    if not len(kept):
        raise InputError("the hidden mask removes every dimension; there is nothing left to compute with")
    target = padded_size(len(kept), dense, alignment)
    divisor = mask.norm_divisor or (len(kept) if mask.norm_sees_kept else size)
    scale = divisor / target
    if scale != 1 and dense.family.qk_norm is not None:
        raise InputError(
            f"the norms of {dense.family.architecture} share one rms_norm_eps with those of q and k, which see no "
            "hidden dimensions; so hidden dimensions cannot be cut from it"
        )
    index = torch.cat((kept, torch.full((target - len(kept),), PAD)))
    norms = torch.full((target,), math.sqrt(scale), dtype=torch.float64) if scale != 1 else None
    if (masked := _at(mask.norms, index)) is not None:
        norms = masked.double() if norms is None else norms * masked
    cut = HiddenCut(
        kept=index,
        exact_size=len(kept),
        embedding=_at(mask.embedding, index),
        outputs=_at(mask.outputs, index),
        norms=None if norms is None else norms.float(),
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)) * scale if scale != 1 else None,
    )
    nothing = target == size and cut.embedding is cut.outputs is cut.norms is None
    return None if nothing else cut


def padded_size(kept: int, dense: ModelGeometry, alignment: int) -> int:
    """The hidden size that `kept` dimensions are written as: aligned, and what the config class takes.

    LlamaConfig demands a multiple of the attention heads at the top level, whatever head_dim is.
    """
    divisor = dense.dense_layers[0].num_attention_heads if dense.family.stock_heads == "divides_hidden" else 1
    aligned = _rounded_up(kept, math.lcm(alignment, divisor))
    if aligned <= dense.hidden_size:
        return aligned
    return _rounded_up(kept, divisor) if dense.hidden_size % divisor else dense.hidden_size


def _rounded_up(size: int, step: int) -> int:
    return -(-size // step) * step


def _used_dimensions(mask: HiddenMask, size: int) -> torch.Tensor:
    """Indices of the dimensions that the embedding or an output puts something into."""
    used = torch.zeros(size, dtype=torch.bool)
    for factors in (mask.embedding, mask.outputs):
        used |= torch.ones(size, dtype=torch.bool) if factors is None else factors != 0
    return used.nonzero().view(-1)


def _at(factors: torch.Tensor | None, index: torch.Tensor) -> torch.Tensor | None:
    """The factors at `index`, 1 for padding; None where all are 1."""
    if factors is None:
        return None
    chosen = torch.where(index == PAD, 1, factors.float()[index.clamp(min=0)])
    return None if bool((chosen == 1).all()) else chosen
