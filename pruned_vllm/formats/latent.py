"""Attention with one latent vector for all heads (MLA, arXiv 2405.04434): its sizes and tensors. Pure Python.

A token's keys and values are computed from `kv_lora_rank` numbers, and `qk_rope_head_dim` more that RoPE turns; these
are all that the KV cache holds, whatever the number of heads. So a head that goes makes the weights smaller and the
cache not, and attention stays whole here: a layer has all of its heads or no attention at all.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pruned_vllm.formats.config_values import positive

LATENT_NORM_EPS = 1e-6  # of the norms inside of attention, in Hugging Face's models, whatever rms_norm_eps is
WHY_WHOLE = "keeps one latent vector of a token for all heads, so its KV cache would stay as large without some of them"


@dataclass(frozen=True)
class LatentAttention:
    """Sizes of the attention of every layer.

    Attributes:
        q_lora_rank: numbers that queries are computed from; None: from the hidden states.
        kv_lora_rank: numbers that keys and values of all heads are computed from.
        qk_nope_head_dim, qk_rope_head_dim: numbers of a head's q and k that RoPE leaves, and those that it turns. The
            turned ones of k are the same for all heads.
        v_head_dim: numbers of a head's v and of its output.
    """

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any], sizes: Mapping[str, Any]) -> "LatentAttention":
        """Reads a config.json. Raises ValueError with the first key that is wrong.

        Args:
            config: as it is: here null is no default, it says that there is no low rank of queries.
            sizes: the same with defaults.
        """
        heads, kv_heads = (sizes.get(key) for key in ("num_attention_heads", "num_key_value_heads"))
        if heads != kv_heads:
            raise ValueError(
                f"num_key_value_heads is {kv_heads}, but num_attention_heads {heads}: with a latent vector for all "
                "heads, both are the same"
            )
        has_rank = "q_lora_rank" not in config or config["q_lora_rank"] is not None
        names = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        return cls(positive(config, "q_lora_rank") if has_rank else None, *(positive(config, name) for name in names))

    @property
    def qk_head_dim(self) -> int:
        """Numbers of a head's q and k."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_width(self) -> int:
        """Numbers of a token that a layer keeps in the KV cache."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def linear_shapes(self, hidden_size: int, heads: int) -> dict[str, tuple[int, int]]:
        """The weights of the linear layers, by module in a decoder layer."""
        q, kv = heads * self.qk_head_dim, heads * (self.qk_nope_head_dim + self.v_head_dim)
        shapes = {"q_proj": (q, hidden_size)}
        if self.q_lora_rank is not None:
            shapes = {"q_a_proj": (self.q_lora_rank, hidden_size), "q_b_proj": (q, self.q_lora_rank)}
        shapes |= {"kv_a_proj_with_mqa": (self.cache_width, hidden_size), "kv_b_proj": (kv, self.kv_lora_rank)}
        shapes["o_proj"] = (hidden_size, heads * self.v_head_dim)
        return {f"self_attn.{name}": shape for name, shape in shapes.items()}

    @property
    def norm_sizes(self) -> dict[str, int]:
        """The norms inside of attention, by module in a decoder layer."""
        sizes = {"self_attn.kv_a_layernorm": self.kv_lora_rank}
        return sizes if self.q_lora_rank is None else {"self_attn.q_a_layernorm": self.q_lora_rank, **sizes}
