"""DeepSeekMoE-16B, as published (arXiv 2401.06066): the oracle for a model that Transformers lacks.

Its attention is Llama's. Its router takes the top k of a softmax over all experts and, unless `norm_topk_prob`, uses
these probabilities as they are; the shared experts are one MLP that is added for every token.

Every layer is built as a geometry says, so that the same code computes dense and converted models. It is also the code
that a checkpoint brings (tests/remote_code/). So it does what the published code does and learning has to cope with:
- Rotary frequencies are a buffer that is in no file.
- Experts have gradients in training mode only.
- There the router adds a balancing loss to the gradients, whatever loss they are of.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.layer import LayerGeometry
from pruned_vllm.serving.deepseek_config import DeepseekConfig


class Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, eps=1e-6)


class Attention(nn.Module):
    def __init__(self, hidden_size: int, head_dim: int, groups: tuple[int, ...], config: DeepseekConfig) -> None:
        super().__init__()
        self.head_dim, self.groups, self.config = head_dim, groups, config
        self.q_proj = nn.Linear(hidden_size, sum(groups) * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, len(groups) * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, len(groups) * head_dim, bias=False)
        self.o_proj = nn.Linear(sum(groups) * head_dim, hidden_size, bias=False)
        frequencies = 10000 ** (-torch.arange(head_dim // 2) / (head_dim // 2))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        groups = torch.tensor(self.groups)
        k, v = (heads.repeat_interleave(groups, dim=1) for heads in (self.rotate(k), v))
        return self.o_proj(
            F.scaled_dot_product_attention(self.rotate(q), k, v, is_causal=True).transpose(1, 2).flatten(2)
        )

    def rotate(self, heads: torch.Tensor) -> torch.Tensor:
        angles = torch.arange(heads.shape[2])[:, None] * self.frequencies
        cos, sin = angles.cos(), angles.sin()
        first, second = heads.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class MLP(nn.Module):
    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    def __init__(self, hidden_size: int, num_experts: int, config: DeepseekConfig) -> None:
        super().__init__()
        self.top_k, self.renormalise, self.alpha = (
            config.num_experts_per_tok,
            config.norm_topk_prob,
            config.aux_loss_alpha,
        )
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Experts of each token, their weights, and in training mode the balancing loss."""
        scores, loss = F.linear(x, self.weight).softmax(-1), None
        weights, chosen = scores.topk(self.top_k, dim=-1)
        if self.renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        if self.training:
            load = F.one_hot(chosen, scores.shape[-1]).float().mean((0, 1, 2))
            loss = self.alpha * scores.shape[-1] * (load * scores.mean((0, 1))).sum()
        return chosen, weights, loss


class AddToGradients(torch.autograd.Function):
    """Passes x on; a backward pass goes through `loss` too."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gradient, gradient.new_ones(())


class MoE(nn.Module):
    def __init__(self, hidden_size: int, widths: tuple[int, ...], shared_width: int, config: DeepseekConfig) -> None:
        super().__init__()
        self.gate = Router(hidden_size, len(widths), config)
        self.experts = nn.ModuleList(MLP(hidden_size, width) if width else nn.Module() for width in widths)
        self.shared_experts = MLP(hidden_size, shared_width) if shared_width else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen, weights, loss = self.gate(x)
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            routed = torch.zeros_like(x)
            for index, expert in enumerate(self.experts):
                *token, place = torch.where(chosen == index)
                if isinstance(expert, MLP):
                    output = expert(x[*token]) * weights[*token, place, None]
                    routed = routed.index_put(tuple(token), output, accumulate=True)
        if loss is not None:
            routed = AddToGradients.apply(routed, loss)
        return routed if self.shared_experts is None else routed + self.shared_experts(x)


class Layer(nn.Module):
    def __init__(self, geometry: ModelGeometry, layer: LayerGeometry, config: DeepseekConfig) -> None:
        super().__init__()
        hidden_size = geometry.hidden_size
        if layer.query_heads_per_kv_head:
            self.input_layernorm = Norm(hidden_size)
            self.self_attn = Attention(hidden_size, geometry.head_dim, layer.query_heads_per_kv_head, config)
        if layer.expert_intermediate_sizes:
            self.mlp = MoE(hidden_size, layer.expert_intermediate_sizes, layer.intermediate_size, config)
        elif layer.intermediate_size:
            self.mlp = MLP(hidden_size, layer.intermediate_size)
        if hasattr(self, "mlp"):
            self.post_attention_layernorm = Norm(hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if hasattr(self, "self_attn"):
            x = x + self.self_attn(self.input_layernorm(x))
        if hasattr(self, "mlp"):
            x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class DeepseekModel(nn.Module):
    def __init__(self, geometry: ModelGeometry, config: DeepseekConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(geometry.vocab_size, geometry.hidden_size)
        self.layers = nn.ModuleList(Layer(geometry, layer, config) for layer in geometry.layers)
        self.norm = Norm(geometry.hidden_size)
        self.gradient_checkpointing = False  # Transformers sets it, and what recomputes

    def forward(
        self, input_ids: torch.Tensor, use_cache: bool | None = None, output_hidden_states: bool = False
    ) -> BaseModelOutput:
        """Normed output of the last layer, and the hidden states before and after each layer."""
        states = [self.embed_tokens(input_ids)]
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                states.append(self._gradient_checkpointing_func(layer.__call__, states[-1]))
            else:
                states.append(layer(states[-1]))
        return BaseModelOutput(self.norm(states[-1]), tuple(states) if output_hidden_states else None)


class DeepseekForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = DeepseekConfig
    decoder_class = DeepseekModel
    base_model_prefix = "model"
    supports_gradient_checkpointing = True

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__(config)
        geometry = ModelGeometry.from_config(config.to_dict())
        self.model = self.decoder_class(geometry, config)
        self.lm_head = nn.Linear(geometry.hidden_size, geometry.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, **options) -> CausalLMOutput:
        outputs = self.model(input_ids=input_ids, **options)
        return CausalLMOutput(logits=self.lm_head(outputs.last_hidden_state), hidden_states=outputs.hidden_states)


def load(directory: Path) -> DeepseekForCausalLM:
    """A dense or converted model; every tensor must fit."""
    model = DeepseekForCausalLM(DeepseekConfig(**json.loads((directory / "config.json").read_text())))
    shards = [load_file(path) for path in directory.glob("*.safetensors")]
    model.load_state_dict({name: tensor for shard in shards for name, tensor in shard.items()})
    return model.eval().requires_grad_(False)
