"""Cuts hidden dimensions: which stay, and what every tensor is multiplied by along them.

The hidden states enter by the embedding, and attention and MLP add to them through o_proj and down_proj. A dimension
into which none of these puts anything is zero everywhere, so it can go. So can one that no RMSNorm looks at, since
nothing but the norms reads the hidden states. Why the rest is exact, with z the masks:

- z of the embedding goes into its columns; lm_head keeps the values without z, so one that was tied is no longer
- z of the outputs goes into the rows of o_proj and down_proj and into their biases
- z of the norms goes into the norms' weights
- RMSNorm of D dimensions is x / sqrt(sum(x^2) / K + eps) * w with K = D. With another K in training, or another D
  after the cut, w sqrt(K / D) and eps K / D compute what K and eps computed. The dimensions that went added nothing to
  the sum, and those that are added as padding are zeros, so the sum stays what it was.
- The norms of q and k, where a model has such, share eps with the others, but their K and D stay. With q and k
  multiplied by sqrt(K / D), the norm gives for eps K / D what it gave for eps.
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
from pruned_vllm.formats.config_values import shown
from pruned_vllm.formats.family import Family
from pruned_vllm.formats.geometry import ModelGeometry

EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
LARGEST_EPSILON = 1e30  # of a norm; no model has as much, and float32 can say it
_OUTPUTS = (".o_proj.", ".down_proj.", ".w2.")
_NORMED_PROJECTIONS = (".q_proj.", ".k_proj.")
# Tensors of one dimension, and weights, that have no hidden dimension.
_WITHOUT_HIDDEN = (
    *(".q_norm.weight", ".k_norm.weight", ".q_a_layernorm.weight", ".kv_a_layernorm.weight", ".sinks"),
    *(".q_b_proj.weight", ".kv_b_proj.weight", ".e_score_correction_bias"),
)


@dataclass(frozen=True)
class HiddenCut:
    """What happens to the hidden dimensions of a model.

    Attributes:
        hidden_size, exact_size: how many are written, and how many of them are not padding.
        kept: indices of those that are written, PAD for dimensions of zeros; None where all stay as they are.
        embedding, outputs, norms: float32, one factor for each that is written; None is 1.
        normed_projections: what q and k are multiplied by in a model that norms them.
        rms_norm_eps: the new value; None where it stays.
    """

    hidden_size: int
    exact_size: int
    kept: torch.Tensor | None
    embedding: torch.Tensor | None
    outputs: torch.Tensor | None
    norms: torch.Tensor | None
    normed_projections: float
    rms_norm_eps: float | None

    def cut(self, name: str, shape: tuple[int, ...], inner: Cut | None) -> Cut | None:
        """The cut of one tensor; None leaves it as it is.

        Args:
            name, shape: of the tensor.
            inner: its cut along the other dimension, that of heads and channels.
        """
        result = self._cut(name, shape, inner or Cut())
        parts = (result.rows, result.row_factors, result.columns, result.column_factors)
        return None if all(part is None for part in parts) else result

    def _cut(self, name: str, shape: tuple[int, ...], inner: Cut) -> Cut:
        if name == EMBEDDING:
            return replace(inner, columns=self.kept, column_factors=self.embedding)
        if name.endswith(_WITHOUT_HIDDEN):
            return inner
        if is_output(name):
            return replace(inner, rows=self.kept, row_factors=self.outputs)
        if self.normed_projections != 1 and any(part in name for part in _NORMED_PROJECTIONS):
            rows = shape[0] if inner.rows is None else len(inner.rows)
            inner = replace(inner, row_factors=torch.full((rows,), self.normed_projections))
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
        InputError: no dimension is left, the family cannot have another hidden size, or rms_norm_eps is no number.
    """
    size, epsilon = dense.hidden_size, _rms_norm_eps(dense.family, config)
    seen, kept = _seen_and_used(mask, size)
    if not len(kept):
        raise InputError("the hidden mask removes every dimension; there is nothing left to compute with")
    target = padded_size(len(kept), dense, alignment)
    if target != size and dense.qk_norm == "all_heads":
        raise InputError(
            f"{dense.family.architecture} has one norm for all heads of q, which is as wide as the hidden states; so "
            "hidden dimensions cannot be cut from it"
        )
    scale = (mask.norm_divisor or seen) / target
    index = torch.cat((kept, torch.full((target - len(kept),), PAD)))
    norms = torch.full((target,), math.sqrt(scale), dtype=torch.float64) if scale != 1 else None
    if (masked := _at(mask.norms, index)) is not None:
        norms = masked.double() if norms is None else norms * masked
    cut = HiddenCut(
        hidden_size=target,
        exact_size=len(kept),
        kept=None if target == size == len(kept) else index,
        embedding=_at(mask.embedding, index),
        outputs=_at(mask.outputs, index),
        norms=None if norms is None else norms.float(),
        normed_projections=math.sqrt(scale) if dense.qk_norm is not None else 1,
        rms_norm_eps=epsilon * scale if scale != 1 else None,
    )
    nothing = cut.kept is cut.embedding is cut.outputs is cut.norms is None
    if nothing:
        return None
    if dense.family.scales_embedding or len(dense.family.mlp_norms) > 1:
        raise InputError(
            f"hidden dimensions cannot be cut from {dense.family.architecture}: it multiplies the embedding by the "
            "root of their number and normalises what sublayers add, so no factor on either can be folded into weights"
        )
    if dense.linear_attention is not None:
        raise InputError(
            f"hidden dimensions cannot be cut from {dense.family.architecture}: no project that masks them knows "
            "linear attention, so there is nothing to compare with"
        )
    return cut


def padded_size(kept: int, dense: ModelGeometry, alignment: int) -> int:
    """The hidden size that `kept` dimensions are written as: aligned, and what the config class takes.

    LlamaConfig demands a multiple of the attention heads at the top level, whatever head_dim is.
    """
    divisor = dense.dense_layers[0].num_attention_heads if dense.family.stock_heads == "divides_hidden" else 1
    aligned = _rounded_up(kept, math.lcm(alignment, divisor))
    if aligned <= dense.hidden_size:
        return aligned
    return _rounded_up(kept, divisor) if dense.hidden_size % divisor else dense.hidden_size


def _rms_norm_eps(family: Family, config: Mapping[str, Any]) -> float:
    # 1e-6 in the stock classes of all families that `defaults` do not name; null they refuse.
    value = family.with_defaults(config).get("rms_norm_eps", 1e-6)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < LARGEST_EPSILON:
        raise InputError(f"config.json: rms_norm_eps is {shown(value)}; it must be a number of at least 0")
    return float(value)


def _rounded_up(size: int, step: int) -> int:
    return -(-size // step) * step


def _seen_and_used(mask: HiddenMask, size: int) -> tuple[int, torch.Tensor]:
    """How many dimensions the norms saw, and the indices of those that have to stay."""
    written, seen = torch.zeros(size, dtype=torch.bool), torch.ones(size, dtype=torch.bool)
    for factors in (mask.embedding, mask.outputs):
        written |= torch.ones(size, dtype=torch.bool) if factors is None else factors != 0
    if mask.norm_sees_kept and mask.norms is not None:
        seen = mask.norms != 0
    return int(seen.sum()), (written & seen).nonzero().view(-1)


def _at(factors: torch.Tensor | None, index: torch.Tensor) -> torch.Tensor | None:
    """The factors at `index`, 1 for padding; None where all are 1."""
    if factors is None:
        return None
    chosen = torch.where(index == PAD, 1, factors.float()[index.clamp(min=0)])
    return None if bool((chosen == 1).all()) else chosen
