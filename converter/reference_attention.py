"""Attention of every family in float32: of heads, of heads from a latent vector, and the gated delta net."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F

from converter.positions import Positions, visible
from converter.reference_modules import ReferenceModules
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.latent import LATENT_NORM_EPS
from pruned_vllm.formats.linear_attention import MODULE


@dataclass(frozen=True)
class ReferenceAttention:
    """What stands before o_proj, or in the place of attention.

    Attributes:
        config, geometry, modules: of the model.
    """

    config: Mapping[str, Any]
    geometry: ModelGeometry
    modules: ReferenceModules

    def heads(self, index: int, states: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Output of each query head [tokens, query heads, numbers of a head]."""
        make = self._query_key_value if self.geometry.latent is None else self._latent_query_key_value
        q, k, v, gate = make(index, states, lengths)
        prompts = zip(*(heads.transpose(0, 1).split(list(lengths), dim=1) for heads in (q, k, v)), strict=True)
        window, scale = self._positions.window(index), self._positions.scale
        name = f"model.layers.{index}.self_attn.sinks"
        sinks = self.modules.rounded(self.modules.tensor(name).float(), name) if self.geometry.family.sinks else None
        outputs = []
        for q, k, v in prompts:
            seen = visible(q.shape[1], window)
            if sinks is not None:  # a key before all others, whose product with q is the sink, and whose value is zeros
                bias = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf).expand(len(sinks), -1, -1)
                seen = torch.cat((sinks[:, None, None].expand(-1, len(bias[0]), -1), bias), dim=2)
                k, v = F.pad(k, (0, 0, 1, 0)), F.pad(v, (0, 0, 1, 0))
            outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale))
        result = torch.cat(outputs, dim=1).transpose(0, 1)
        return result if gate is None else result * gate.sigmoid()

    def _query_key_value(
        self, index: int, states: torch.Tensor, lengths: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """q, k and v of each query head [tokens, query heads, head_dim], turned, and its gate where it has one."""
        norm, size, prefix = self.geometry.qk_norm, self.geometry.head_dim, f"model.layers.{index}.self_attn."
        q, k, v = (self.modules.linear(f"{prefix}{name}_proj", states) for name in "qkv")
        gate = None
        if self.geometry.family.output_gate:
            q, gate = q.unflatten(1, (-1, 2 * size)).chunk(2, dim=-1)
            q = q.flatten(1)
        if norm == "all_heads":
            q, k = self.modules.rms_norm(f"{prefix}q_norm", q), self.modules.rms_norm(f"{prefix}k_norm", k)
        q, k, v = (heads.unflatten(1, (-1, size)) for heads in (q, k, v))
        if norm == "head":
            q, k = self.modules.rms_norm(f"{prefix}q_norm", q), self.modules.rms_norm(f"{prefix}k_norm", k)
        q, k = self._positions.turned(index, lengths, q, k)
        repeats = torch.tensor(self.geometry.layers[index].query_heads_per_kv_head)
        return q, k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1), gate

    def _latent_query_key_value(
        self, index: int, states: torch.Tensor, lengths: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        """q and k of each head [tokens, heads, qk_head_dim], turned, and v [tokens, heads, v_head_dim]; no gate."""
        latent, prefix = self.geometry.latent, f"model.layers.{index}.self_attn."
        assert latent is not None
        heads = self.geometry.layers[index].num_attention_heads

        def normed(name: str, values: torch.Tensor) -> torch.Tensor:
            return self.modules.rms_norm(prefix + name, values, epsilon=LATENT_NORM_EPS)

        if latent.q_lora_rank is None:
            q = self.modules.linear(f"{prefix}q_proj", states)
        else:
            low = normed("q_a_layernorm", self.modules.linear(f"{prefix}q_a_proj", states))
            q = self.modules.linear(f"{prefix}q_b_proj", low)
        low = self.modules.linear(f"{prefix}kv_a_proj_with_mqa", states)
        compressed, turning = low.tensor_split([latent.kv_lora_rank], 1)
        kv = self.modules.linear(f"{prefix}kv_b_proj", normed("kv_a_layernorm", compressed)).unflatten(1, (heads, -1))
        k_resting, v = kv.tensor_split([latent.qk_nope_head_dim], -1)
        q_resting, q_turning = q.unflatten(1, (heads, -1)).tensor_split([latent.qk_nope_head_dim], -1)
        q_turned, k_turned = self._positions.turned(index, lengths, q_turning, turning[:, None])
        k = torch.cat((k_resting, k_turned.expand(-1, heads, -1)), dim=-1)
        return torch.cat((q_resting, q_turned), dim=-1), k, v, None

    def gated_delta_net(self, index: int, states: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """What a gated delta net makes of normed states. As Transformers computes it: no conversion changes one."""
        import transformers  # late: an import of seconds

        model_class = getattr(transformers, self.geometry.family.architecture)
        same = {key: value for key, value in self.config.items() if key != "per_layer_config"}
        config = model_class.config_class.from_dict(same)
        name = self.geometry.family.architecture.removesuffix("ForCausalLM") + "GatedDeltaNet"
        prefix = f"model.layers.{index}.{MODULE}."
        with torch.device("meta"):
            module = getattr(sys.modules[model_class.__module__], name)(config, index)
        tensors = {}
        for part in module.state_dict():
            tensors[part] = self.modules.rounded(self.modules.tensor(prefix + part).float(), prefix + part)
        module.load_state_dict(tensors, assign=True)
        return torch.cat([module(prompt[None])[0] for prompt in states.split(list(lengths))])

    @cached_property
    def _positions(self) -> Positions:
        return Positions(self.config, self.geometry)
