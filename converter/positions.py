"""What attention does with positions, for a plain forward pass of every family: angles, windows, the scale of queries.

Every family turns q and k as Llama does, some of them a part of each head, or by other angles in other layers. Where
attention has one latent vector for all heads, neighbours are turned together: numbers 2i and 2i + 1 of a head, not i
and i + head_dim / 2. Put in the order of the others, the products of q and k are the same.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.agreed_config import agreed_config, query_scaling
from pruned_vllm.formats.geometry import ModelGeometry

# Keys of config.json from which the config class of a family makes angles and windows.
ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq", "partial_rotary_factor")
POSITION_KEYS = (*ROPE_KEYS, "max_position_embeddings", "original_max_position_embeddings")
WINDOW_KEYS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "sliding_window_pattern")
# What LlamaConfig does not know of rope_parameters, since Llama does it in no layer.
_NOT_LLAMA = (
    *("partial_rotary_factor", "llama_4_scaling_beta", "max_position_embeddings"),
    *("mrope_section", "mrope_interleaved"),  # all positions of a token of text are the same
)


class Positions:
    """Of a model with this config.json and these sizes."""

    def __init__(self, config: Mapping[str, Any], geometry: ModelGeometry) -> None:
        self._config, self._geometry = agreed_config(geometry.family, config), geometry
        self._rotary: dict[str, torch.nn.Module] = {}  # by type of layer, "" where all are alike

    @property
    def scale(self) -> float:
        """What the products of q and k are multiplied by."""
        family, latent = self._geometry.family, self._geometry.latent
        if latent is not None:
            return latent.qk_head_dim**-0.5 * self._yarn_scale
        given = family.with_defaults(self._config)
        if family.multipliers:
            return float(given.get("attention_multiplier", 1))
        return float(given[family.query_scale_key] if family.query_scale_key else self._geometry.head_dim) ** -0.5

    @property
    def _yarn_scale(self) -> float:
        """What DeepSeek's models multiply the scale by where texts are longer than those they were trained on."""
        rope = self._read.rope_parameters
        magnitude = rope.get("mscale_all_dim") if rope["rope_type"] != "default" else None
        if not magnitude or rope["factor"] <= 1:
            return 1.0
        return (0.1 * magnitude * math.log(rope["factor"]) + 1) ** 2

    def window(self, index: int) -> int | None:
        """How many tokens a token of layer `index` sees, itself among them; None: all before it."""
        window, layer_types = (getattr(self._read, key, None) for key in ("sliding_window", "layer_types"))
        return None if layer_types and layer_types[index] != "sliding_attention" else window or None

    def turned(
        self, index: int, lengths: Sequence[int], q: torch.Tensor, k: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q and k [tokens, heads, head_dim] of prompts of these lengths, as layer `index` turns and scales them."""
        if self._geometry.latent is not None:
            q, k = (heads.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) for heads in (q, k))
        positions = [torch.arange(length) for length in lengths]
        rotary = self._rotary_embedding(index)  # by prompt: some angles depend on its length
        angles = [rotary(torch.zeros(1), prompt[None]) for prompt in positions]
        cos, sin = (torch.cat([pair[number][0] for pair in angles])[:, None] for number in (0, 1))
        q, k = (_turned(heads, cos, sin) for heads in (q, k))
        if scaling := query_scaling(self._geometry.family, self._config):
            steps = torch.floor(torch.cat(positions) / scaling["original_max_position_embeddings"])
            q = q * (1 + scaling["beta"] * torch.log(1 + steps))[:, None, None]
        return q, k

    @cached_property
    def _read(self) -> Any:
        """What the family's config class makes of the keys about positions."""
        from transformers import CONFIG_MAPPING, LlamaConfig  # late: an import of seconds

        model_type, head = self._geometry.family.model_type, self._geometry.head_dim
        config_class = CONFIG_MAPPING[model_type] if model_type in CONFIG_MAPPING else LlamaConfig  # noqa: SIM401
        given = {key: self._config[key] for key in POSITION_KEYS if self._config.get(key) is not None}
        windows = {key: self._config[key] for key in WINDOW_KEYS if key in self._config}  # null is no window
        sizes = {**_one_head(head), "num_hidden_layers": len(self._geometry.layers)}
        return _built(lambda: config_class(**sizes, **given, **windows), given)

    def _rotary_embedding(self, index: int) -> torch.nn.Module:
        """Cosines and sines [1, tokens, numbers of a head that turn] of positions [1, tokens]."""
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        rope, kind = self._read.rope_parameters, ""
        if "full_attention" in rope:
            kind = self._read.layer_types[index]
            rope = rope[kind]
        if kind not in self._rotary:
            size = int(self._geometry.head_dim * rope.get("partial_rotary_factor", 1))
            if size < 2 or size % 2:
                raise InputError(
                    f"config.json: partial_rotary_factor is {rope['partial_rotary_factor']}, so that {size} of the "
                    f"{self._geometry.head_dim} numbers of a head turn; RoPE turns pairs, so it must be an even number"
                )
            given = {"rope_parameters": {key: value for key, value in rope.items() if key not in _NOT_LLAMA}}
            given |= {"max_position_embeddings": self._read.max_position_embeddings}
            self._rotary[kind] = _built(lambda: LlamaRotaryEmbedding(LlamaConfig(**_one_head(size), **given)), given)
        return self._rotary[kind]


def visible(tokens: int, window: int | None) -> torch.Tensor:
    """Which tokens each token of a prompt sees, bool [tokens, tokens]."""
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    return causal if window is None else causal.triu(1 - window)


def _one_head(size: int) -> dict[str, int]:
    return {"head_dim": size, "hidden_size": size, "num_attention_heads": 1, "num_key_value_heads": 1}


def _built(build: Callable[[], Any], given: Mapping[str, Any]) -> Any:
    """What `build` makes of these keys of config.json. Raises InputError."""
    try:
        return build()
    except Exception as error:  # the checks of Transformers raise errors of many kinds
        found = ", ".join(given)
        raise InputError(f"config.json: Transformers refuses {found}: {type(error).__name__}: {error}") from None


def _turned(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The first numbers of each head turned, as many as there are angles; cos, sin: [tokens, 1, numbers]."""
    turning, resting = heads[..., : cos.shape[-1]], heads[..., cos.shape[-1] :]
    first, second = turning.chunk(2, dim=-1)
    return torch.cat((turning * cos + torch.cat((-second, first), dim=-1) * sin, resting), dim=-1)
