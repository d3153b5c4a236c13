"""A plain forward pass of every family in float32, with masks applied while it runs: what a conversion is held to.

It shares nothing with what folds and cuts (fold.py, hidden.py): a head mask multiplies the head's output, a channel
mask what `channel_mask_site` says, a mask of hidden dimensions the states themselves. One part of one tensor is in
memory in float32 at a time. What depends on positions is in converter/positions.py.
"""

import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F

from converter.positions import Positions, visible
from converter.source import HiddenMask
from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.latent import LATENT_NORM_EPS
from pruned_vllm.formats.layer import LayerGeometry
from pruned_vllm.formats.linear_attention import MODULE
from pruned_vllm.formats.masked import LayerMasks

PART_NUMBERS = 1 << 24  # of a weight that are in float32 at the same time


@dataclass(frozen=True)
class ReferenceModel:
    """A causal language model.

    Attributes:
        config: its config.json.
        geometry: the sizes that its tensors have.
        read: a tensor by its full name, in any dtype; None where there is none.
        masks: one entry for each layer; None: there are none.
        channel_mask_site: "product" or "gate_and_up".
        hidden: masks of the hidden dimensions.
        dropped_experts: for each layer the experts that its router must not choose; None: it may choose all.
        rounding: if given, every weight is off by what rounding to this dtype does after a multiplication: row by row
            it is multiplied by a number that is drawn at random, rounded, and divided again.
    """

    config: Mapping[str, Any]
    geometry: ModelGeometry
    read: Callable[[str], torch.Tensor | None]
    masks: Sequence[LayerMasks[torch.Tensor]] | None = None
    channel_mask_site: str = "product"
    hidden: HiddenMask = field(default_factory=HiddenMask)
    dropped_experts: Sequence[tuple[int, ...]] | None = None
    rounding: torch.dtype | None = None

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Hidden states [tokens, hidden_size] of token ids [tokens]."""
        states = self._rounded(self._weight("model.embed_tokens")[tokens].float(), "embed_tokens")
        if self.geometry.family.scales_embedding:
            states = states * self.geometry.hidden_size**0.5
        states = states * self._multiplier("embedding_multiplier")
        return _times(states, self.hidden.embedding)

    def layer(
        self, index: int, states: torch.Tensor, lengths: Sequence[int], chosen: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The states after a layer.

        Args:
            lengths: of the prompts, whose tokens lie one after another in `states` [tokens, hidden_size].
            chosen: experts of each token [tokens, experts of a token], where another model has chosen; the weights
                that they get are this model's.

        Returns:
            states of the same shape, and the experts that were chosen, in a layer that has any.
        """
        layer, prefix, family = self.geometry.layers[index], f"model.layers.{index}.", self.geometry.family
        masks = LayerMasks[torch.Tensor]() if self.masks is None else self.masks[index]
        if layer.linear_attention:
            normed = self._norm(prefix + family.attention_norms[0], states)
            added = self._linear_attention(index, normed, lengths)
        elif layer.query_heads_per_kv_head:
            normed = self._norm(prefix + family.attention_norms[0], states)
            heads = self._attention(index, normed, lengths)
            if masks.head is not None:
                heads = heads * masks.head[:, None]
            added = self._linear(f"{prefix}self_attn.o_proj", heads.flatten(1))
            added = self._normed_output(prefix, family.attention_norms, added)
        else:
            added = self._bias(f"{prefix}self_attn.o_proj")
        factor = self._multiplier("residual_multiplier")
        states = states + _times(added, self.hidden.outputs) * factor
        if layer.expert_intermediate_sizes:
            normed = self._norm(prefix + family.mlp_norms[0], states)
            dropped = () if self.dropped_experts is None else self.dropped_experts[index]
            added, chosen = self._experts(prefix, normed, layer, masks, dropped, chosen)
            added = self._normed_output(prefix, family.mlp_norms, added)
        elif layer.intermediate_size:
            normed = self._norm(prefix + family.mlp_norms[0], states)
            modules = tuple(f"{prefix}mlp.{name}_proj" for name in ("gate", "up", "down"))
            added = self._normed_output(prefix, family.mlp_norms, self._mlp(modules, normed, masks.channel))
        else:
            added = self._bias(f"{prefix}mlp.down_proj")
        return states + _times(added, self.hidden.outputs) * factor, chosen

    def log_probabilities(self, states: torch.Tensor) -> torch.Tensor:
        """Of every token of the vocabulary after each position [tokens, vocab_size]."""
        head = "model.embed_tokens" if self.geometry.tie_word_embeddings else "lm_head"
        logits = self._linear(head, self._norm("model.norm", states))
        return (logits / self._multiplier("logits_scaling")).log_softmax(-1)

    def _multiplier(self, key: str) -> float:
        return float(self.config.get(key, 1)) if key in self.geometry.family.multipliers else 1.0

    def _attention(self, index: int, states: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Output of each query head [tokens, query heads, numbers of a head]."""
        make = self._query_key_value if self.geometry.latent is None else self._latent_query_key_value
        q, k, v, gate = make(index, states, lengths)
        prompts = zip(*(heads.transpose(0, 1).split(list(lengths), dim=1) for heads in (q, k, v)), strict=True)
        window, scale = self._positions.window(index), self._positions.scale
        name = f"model.layers.{index}.self_attn.sinks"
        sinks = self._rounded(self._read(name).float(), name) if self.geometry.family.sinks else None
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
        q, k, v = (self._linear(f"{prefix}{name}_proj", states) for name in "qkv")
        gate = None
        if self.geometry.family.output_gate:
            q, gate = q.unflatten(1, (-1, 2 * size)).chunk(2, dim=-1)
            q = q.flatten(1)
        if norm == "all_heads":
            q, k = self._rms_norm(f"{prefix}q_norm", q), self._rms_norm(f"{prefix}k_norm", k)
        q, k, v = (heads.unflatten(1, (-1, size)) for heads in (q, k, v))
        if norm == "head":
            q, k = self._rms_norm(f"{prefix}q_norm", q), self._rms_norm(f"{prefix}k_norm", k)
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
            return self._rms_norm(prefix + name, values, epsilon=LATENT_NORM_EPS)

        if latent.q_lora_rank is None:
            q = self._linear(f"{prefix}q_proj", states)
        else:
            low = normed("q_a_layernorm", self._linear(f"{prefix}q_a_proj", states))
            q = self._linear(f"{prefix}q_b_proj", low)
        compressed, turning = self._linear(f"{prefix}kv_a_proj_with_mqa", states).tensor_split([latent.kv_lora_rank], 1)
        kv = self._linear(f"{prefix}kv_b_proj", normed("kv_a_layernorm", compressed)).unflatten(1, (heads, -1))
        k_resting, v = kv.tensor_split([latent.qk_nope_head_dim], -1)
        q_resting, q_turning = q.unflatten(1, (heads, -1)).tensor_split([latent.qk_nope_head_dim], -1)
        q_turned, k_turned = self._positions.turned(index, lengths, q_turning, turning[:, None])
        k = torch.cat((k_resting, k_turned.expand(-1, heads, -1)), dim=-1)
        return torch.cat((q_resting, q_turned), dim=-1), k, v, None

    def _linear_attention(self, index: int, states: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
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
            tensor = self.read(prefix + part)
            if tensor is None:
                raise InputError(f"{prefix}{part} is missing; the model cannot be run without it")
            tensors[part] = self._rounded(tensor.float(), prefix + part)
        module.load_state_dict(tensors, assign=True)
        return torch.cat([module(prompt[None])[0] for prompt in states.split(list(lengths))])

    @cached_property
    def _positions(self) -> Positions:
        return Positions(self.config, self.geometry)

    def _experts(
        self,
        prefix: str,
        states: torch.Tensor,
        layer: LayerGeometry,
        masks: LayerMasks[torch.Tensor],
        dropped: tuple[int, ...],
        chosen: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        names = self.geometry.family.experts_format
        chosen, weights = self._routed(prefix, states, dropped, chosen)
        result = torch.zeros_like(states)
        for expert, width in enumerate(layer.expert_intermediate_sizes):
            token, place = torch.where(chosen == expert)
            modules = tuple(prefix + module for module in names.modules_of(expert))
            if width and len(token):
                mask = None if masks.expert is None else masks.expert[expert]
                output = self._mlp(modules, states[token], mask, names.activation)
            elif expert in layer.constant_experts or names.bias:
                output = self._bias(modules[2])
            else:
                continue
            result.index_add_(0, token, output * weights[token, place, None])
        if layer.intermediate_size:
            modules = tuple(f"{prefix}{names.shared_module}.{name}_proj" for name in ("gate", "up", "down"))
            shared = self._mlp(modules, states, masks.channel)
            if names.shared_gate is not None:
                shared = shared * self._linear(f"{prefix}{names.shared_gate}", states).sigmoid()
            result = result + shared
        return result, chosen

    def _routed(
        self, prefix: str, states: torch.Tensor, dropped: tuple[int, ...], chosen: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The experts of each token, and their weights [tokens, experts of a token]."""
        names, experts = self.geometry.family.experts_format, self.geometry.dense_experts
        logits = self._linear(f"{prefix}{names.router}", states)
        logits[:, list(dropped)] = -torch.inf
        scores = logits.softmax(-1) if names.scoring == "softmax" else logits.sigmoid()
        if chosen is None:
            ranking, best = scores, 1
            if names.correction_bias is not None:
                ranking, best = scores + self._read(f"{prefix}{names.router}.{names.correction_bias}").float(), 2
            ranking = ranking.clone()
            ranking[:, list(dropped)] = -torch.inf
            groups = ranking.unflatten(1, (experts.num_expert_group, -1))
            best = min(best, groups.shape[-1])
            best_groups = groups.topk(best, dim=-1).values.sum(-1).topk(experts.topk_group, dim=-1).indices
            is_open = torch.zeros(groups.shape[:2], dtype=torch.bool).scatter(1, best_groups, True)
            ranking = groups.masked_fill(~is_open[..., None], -torch.inf).flatten(1)
            chosen = ranking.topk(experts.num_experts_per_tok, dim=-1).indices
        weights = scores.gather(1, chosen)
        if experts.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return chosen, weights * experts.routed_scaling_factor

    def _mlp(
        self, modules: tuple[str, ...], states: torch.Tensor, mask: torch.Tensor | None, activation: str = ""
    ) -> torch.Tensor:
        """pruned_vllm/formats/agreement.py refuses other activations than the family's, which is that of dense MLPs."""
        activation = activation or self.geometry.family.activation
        activate: Callable[[torch.Tensor], torch.Tensor] = F.silu
        if activation == "gelu_tanh":
            activate = partial(F.gelu, approximate="tanh")
        gate, up = (self._linear(module, states) for module in modules[:2])
        if activation == "swigluoai":
            gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
            product = _times(gate * torch.sigmoid(1.702 * gate) * (up + 1), mask)
        elif self.channel_mask_site == "product":
            product = _times(activate(gate) * up, mask)
        else:
            product = activate(_times(gate, mask)) * _times(up, mask)
        return self._linear(modules[2], product)

    def _norm(self, name: str, states: torch.Tensor) -> torch.Tensor:
        """RMSNorm of hidden states, of which it may have seen, or counted, fewer dimensions."""
        hidden, seen = self.hidden, states
        divisor = hidden.norm_divisor or states.shape[-1]
        if hidden.norm_sees_kept and hidden.norms is not None:
            seen = states * (hidden.norms != 0)
            divisor = hidden.norm_divisor or int((hidden.norms != 0).sum())
        return _times(self._rms_norm(name, states, seen.square().sum(-1, keepdim=True) / divisor), hidden.norms)

    def _normed_output(self, prefix: str, norms: tuple[str, ...], added: torch.Tensor) -> torch.Tensor:
        """What a sublayer adds, after those of its norms that come behind it."""
        for norm in norms[1:]:
            added = self._norm(prefix + norm, added)
        return added

    def _rms_norm(
        self, name: str, values: torch.Tensor, squares: torch.Tensor | None = None, epsilon: float | None = None
    ) -> torch.Tensor:
        """Args: squares: what their mean is taken to be; epsilon: None is that of config.json."""
        if squares is None:
            squares = values.square().mean(-1, keepdim=True)
        weight = self._rounded(self._weight(name).float(), name)
        if self.geometry.family.norms_add_one:
            weight = 1 + weight
        if epsilon is None:
            epsilon = self.geometry.family.with_defaults(self.config).get("rms_norm_eps", 1e-6)
        return values * torch.rsqrt(squares + epsilon) * weight

    def _linear(self, module: str, values: torch.Tensor) -> torch.Tensor:
        """[tokens, in] -> [tokens, out]"""
        outputs = [values @ part.T for part in self._parts(module)]
        return torch.cat(outputs, dim=1) + self._bias(module)

    def _parts(self, module: str) -> Iterator[torch.Tensor]:
        """Rows of a weight in float32, a few at a time."""
        weight = self._weight(module)
        for number, part in enumerate(weight.split(max(1, PART_NUMBERS // weight.shape[1]))):
            yield self._rounded(part.float(), f"{module}.weight {number}")

    def _weight(self, module: str) -> torch.Tensor:
        return self._read(f"{module}.weight")

    def _read(self, name: str) -> torch.Tensor:
        tensor = self.read(name)
        if tensor is None:
            raise InputError(f"{name} is missing; the model cannot be run without it")
        return tensor

    def _bias(self, module: str) -> torch.Tensor:
        """A module's bias, or zero."""
        bias = self.read(f"{module}.bias")
        return torch.zeros(()) if bias is None else self._rounded(bias.float(), f"{module}.bias")

    def _rounded(self, values: torch.Tensor, seed: str) -> torch.Tensor:
        if self.rounding is None:
            return values
        generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
        factors = 0.5 + torch.rand(len(values), *[1] * (values.dim() - 1), generator=generator) / 2
        return (values * factors).to(self.rounding).float() / factors


def _times(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return values if mask is None else values * mask
