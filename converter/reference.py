"""A plain forward pass of every family in float32, with masks applied while it runs: what a conversion is held to.

It shares nothing with what folds and cuts (fold.py, hidden.py): a head mask multiplies the head's output, a channel
mask what `channel_mask_site` says, a mask of hidden dimensions the states themselves. One part of one tensor is in
memory in float32 at a time. Attention is in reference_attention.py, what depends on positions in positions.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F

from converter.reference_attention import ReferenceAttention
from converter.reference_modules import ReferenceModules
from converter.source import HiddenMask
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.layer import LayerGeometry
from pruned_vllm.formats.masked import LayerMasks


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
        states = self._modules.rounded(self._modules.weight("model.embed_tokens")[tokens].float(), "embed_tokens")
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
            added = self._attention.gated_delta_net(index, normed, lengths)
        elif layer.query_heads_per_kv_head:
            normed = self._norm(prefix + family.attention_norms[0], states)
            heads = self._attention.heads(index, normed, lengths)
            if masks.head is not None:
                heads = heads * masks.head[:, None]
            added = self._modules.linear(f"{prefix}self_attn.o_proj", heads.flatten(1))
            added = self._normed_output(prefix, family.attention_norms, added)
        else:
            added = self._modules.bias(f"{prefix}self_attn.o_proj")
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
            added = self._modules.bias(f"{prefix}mlp.down_proj")
        return states + _times(added, self.hidden.outputs) * factor, chosen

    def log_probabilities(self, states: torch.Tensor) -> torch.Tensor:
        """Of every token of the vocabulary after each position [tokens, vocab_size]."""
        head = "model.embed_tokens" if self.geometry.tie_word_embeddings else "lm_head"
        logits = self._modules.linear(head, self._norm("model.norm", states))
        return (logits / self._multiplier("logits_scaling")).log_softmax(-1)

    def _multiplier(self, key: str) -> float:
        return float(self.config.get(key, 1)) if key in self.geometry.family.multipliers else 1.0

    @cached_property
    def _modules(self) -> ReferenceModules:
        return ReferenceModules(self.geometry.family, self.config, self.read, self.rounding)

    @cached_property
    def _attention(self) -> ReferenceAttention:
        return ReferenceAttention(self.config, self.geometry, self._modules)

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
                output = self._modules.bias(modules[2])
            else:
                continue
            result.index_add_(0, token, output * weights[token, place, None])
        if layer.intermediate_size:
            modules = tuple(f"{prefix}{names.shared_module}.{name}_proj" for name in ("gate", "up", "down"))
            shared = self._mlp(modules, states, masks.channel)
            if names.shared_gate is not None:
                shared = shared * self._modules.linear(f"{prefix}{names.shared_gate}", states).sigmoid()
            result = result + shared
        return result, chosen

    def _routed(
        self, prefix: str, states: torch.Tensor, dropped: tuple[int, ...], chosen: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The experts of each token, and their weights [tokens, experts of a token]."""
        names, experts = self.geometry.family.experts_format, self.geometry.dense_experts
        logits = self._modules.linear(f"{prefix}{names.router}", states)
        logits[:, list(dropped)] = -torch.inf
        scores = logits.softmax(-1) if names.scoring == "softmax" else logits.sigmoid()
        if chosen is None:
            ranking, best = scores, 1
            if names.correction_bias is not None:
                bias = self._modules.tensor(f"{prefix}{names.router}.{names.correction_bias}")
                ranking, best = scores + bias.float(), 2
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
        gate, up = (self._modules.linear(module, states) for module in modules[:2])
        if activation == "swigluoai":
            gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
            product = _times(gate * torch.sigmoid(1.702 * gate) * (up + 1), mask)
        elif self.channel_mask_site == "product":
            product = _times(activate(gate) * up, mask)
        else:
            product = activate(_times(gate, mask)) * _times(up, mask)
        return self._modules.linear(modules[2], product)

    def _norm(self, name: str, states: torch.Tensor) -> torch.Tensor:
        """RMSNorm of hidden states, of which it may have seen, or counted, fewer dimensions."""
        hidden, seen = self.hidden, states
        divisor = hidden.norm_divisor or states.shape[-1]
        if hidden.norm_sees_kept and hidden.norms is not None:
            seen = states * (hidden.norms != 0)
            divisor = hidden.norm_divisor or int((hidden.norms != 0).sum())
        return _times(self._modules.rms_norm(name, states, seen.square().sum(-1, keepdim=True) / divisor), hidden.norms)

    def _normed_output(self, prefix: str, norms: tuple[str, ...], added: torch.Tensor) -> torch.Tensor:
        """What a sublayer adds, after those of its norms that come behind it."""
        for norm in norms[1:]:
            added = self._norm(prefix + norm, added)
        return added


def _times(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return values if mask is None else values * mask
