"""The sizes of a model that all its layers share and pruning leaves alone. Pure Python."""

from dataclasses import dataclass
from typing import Literal

from pruned_vllm.formats.experts import DenseExperts
from pruned_vllm.formats.family import Family
from pruned_vllm.formats.latent import LatentAttention
from pruned_vllm.formats.linear_attention import LinearAttention


@dataclass(frozen=True)
class ModelSizes:
    """What every layer of a model has in common.

    Attributes:
        head_dim: numbers of a head; where attention is `latent`, those of q and k that RoPE turns.
        qkv_bias, o_bias, mlp_bias: whether these projections have a bias.
        linear_attention: of the layers that have one in place of attention; None in a model without such layers.
        qk_norm: how q and k are normalised, in the words of `Family`; None where they are not.
        latent: the sizes of attention with one latent vector for all heads; None in a model with the usual attention.
        experts: what the layers with experts have in common before pruning; None in a model without such layers.
    """

    family: Family
    hidden_size: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    linear_attention: LinearAttention | None
    experts: DenseExperts | None
    qk_norm: Literal["head", "all_heads"] | None
    latent: LatentAttention | None

    @property
    def gated_delta_net(self) -> LinearAttention:
        """`linear_attention`, for code about layers that have one. Raises ValueError in a model without such layers."""
        if self.linear_attention is None:
            raise ValueError(f"this {self.family.architecture} has no linear attention")
        return self.linear_attention

    @property
    def latent_sizes(self) -> LatentAttention:
        """`latent`, for code about such attention. Raises ValueError in a model with the usual attention."""
        if self.latent is None:
            raise ValueError(f"this {self.family.architecture} has no latent attention")
        return self.latent

    @property
    def dense_experts(self) -> DenseExperts:
        """`experts`, for code about layers that have some. Raises ValueError in a model without experts."""
        if self.experts is None:
            raise ValueError(f"this {self.family.architecture} has no experts")
        return self.experts
