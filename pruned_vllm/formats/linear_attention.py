"""Layers with linear attention, a gated delta net, in place of attention: which they are, and their sizes. Pure Python.

Such a layer keeps a state of constant size for each sequence, whatever its length, and no keys and values. vLLM has one
shape of that state for all layers of a model, so pruning leaves the attention of these layers as it is.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pruned_vllm.formats.config_values import LARGEST_COUNT, positive, shown

LINEAR, FULL = "linear_attention", "full_attention"  # what `layer_types` calls layers
MODULE = "linear_attn"  # of a decoder layer
STATE_BYTES = 4  # of a number of the recurrent state, which is float32 whatever the model is

# Of the config classes of Transformers, which are the same for all models so far; the keys begin with "linear_".
DEFAULTS = {
    "num_key_heads": 16,
    "num_value_heads": 32,
    "key_head_dim": 128,
    "value_head_dim": 128,
    "conv_kernel_dim": 4,
}
# How the projections of the inputs are stored: one tensor for q, k, v and z and one for b and a, as Qwen3-Next has
# them, or four as Qwen3.5 has them.
Projections = Literal["joined", "apart"]


def linear_layers(config: Mapping[str, Any], num_layers: int) -> set[int]:
    """The layers with linear attention. Raises ValueError.

    As the config classes of Transformers do, takes all but every fourth one where `layer_types` is missing, or but
    every `full_attention_interval`-th.
    """
    types = config.get("layer_types")
    if types is None:
        step = positive(config, "full_attention_interval", default=4)
        types = [FULL if (index + 1) % step == 0 else LINEAR for index in range(num_layers)]
    if not isinstance(types, list | tuple) or not {*map(str, types)} <= {LINEAR, FULL}:
        raise ValueError(f"layer_types is {shown(types)}; it must be a list of {LINEAR!r} and {FULL!r}")
    if FULL not in types[:num_layers]:
        raise ValueError(f"layer_types has no {FULL!r} in {num_layers} layers; vLLM wants a KV cache in some layer")
    return {index for index, kind in enumerate(types[:num_layers]) if kind == LINEAR}


@dataclass(frozen=True)
class LinearAttention:
    """The sizes of a model's gated delta nets, the same in every layer that has one.

    Attributes:
        projections: how those of the inputs are stored.
        num_key_heads, num_value_heads: heads of q and k, and of v.
        key_head_dim, value_head_dim: numbers in such a head.
        conv_kernel_dim: tokens that the convolution over q, k and v sees.
    """

    projections: Projections
    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_kernel_dim: int

    @classmethod
    def from_config(cls, projections: Projections, config: Mapping[str, Any]) -> "LinearAttention":
        """Reads the top level of config.json. Raises ValueError with the first key that is wrong."""
        read = (positive(config, f"linear_{key}", default, LARGEST_COUNT) for key, default in DEFAULTS.items())
        sizes = cls(projections, *read)
        if sizes.num_value_heads % sizes.num_key_heads:
            raise ValueError(
                f"linear_num_value_heads {sizes.num_value_heads} is not a multiple of linear_num_key_heads "
                f"{sizes.num_key_heads}"
            )
        return sizes

    def is_shared_by(self, ranks: int) -> bool:
        """Whether so many tensor-parallel ranks share its heads, which are not padded."""
        return self.num_key_heads % ranks == 0 == self.num_value_heads % ranks

    @property
    def key_size(self) -> int:
        return self.num_key_heads * self.key_head_dim

    @property
    def value_size(self) -> int:
        return self.num_value_heads * self.value_head_dim

    def tensor_shapes(self, hidden_size: int) -> dict[str, tuple[int, ...]]:
        """The tensors of one layer's gated delta net, by names in the decoder layer."""
        mixed = 2 * self.key_size + self.value_size
        if self.projections == "joined":
            outputs = {"in_proj_qkvz": mixed + self.value_size, "in_proj_ba": 2 * self.num_value_heads}
        else:
            outputs = {"in_proj_qkv": mixed, "in_proj_z": self.value_size}
            outputs |= {"in_proj_b": self.num_value_heads, "in_proj_a": self.num_value_heads}
        shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (rows, hidden_size) for name, rows in outputs.items()}
        shapes |= {
            "conv1d.weight": (mixed, 1, self.conv_kernel_dim),
            "dt_bias": (self.num_value_heads,),
            "A_log": (self.num_value_heads,),
            "norm.weight": (self.value_head_dim,),
            "out_proj.weight": (hidden_size, self.value_size),
        }
        return {f"{MODULE}.{name}": shape for name, shape in shapes.items()}

    @property
    def state_size(self) -> int:
        """Numbers of the recurrent state of a sequence: a matrix for each value head."""
        return self.num_value_heads * self.key_head_dim * self.value_head_dim

    def state_bytes(self, element_bytes: int) -> int:
        """Bytes that a sequence keeps in one layer: the recurrent state, and what the convolution saw last.

        Args:
            element_bytes: of the convolution's numbers, which have the dtype of the model.
        """
        last = (2 * self.key_size + self.value_size) * (self.conv_kernel_dim - 1)
        return self.state_size * STATE_BYTES + last * element_bytes

    @property
    def flops_per_token(self) -> int:
        """Operations of one layer beside its linear layers, at least: the state is read twice and written once."""
        return 3 * 2 * self.state_size + 2 * math.prod(self.tensor_shapes(1)[f"{MODULE}.conv1d.weight"])
