"""DeepSeekMoE-16B in plain torch, as published (arXiv 2401.06066): the oracle for a model that Transformers lacks.

Its attention is Llama's. Its router takes the top k of a softmax over all experts and, unless `norm_topk_prob`, uses
these probabilities as they are; the shared experts are one MLP that is added for every token.

Every layer is built as a geometry says, so that the same code computes dense and converted models.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from pruned_vllm.deepseek_config import DeepseekConfig
from pruned_vllm.geometry import LayerGeometry, ModelGeometry


class Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, eps=1e-6)


class Attention(nn.Module):
    def __init__(self, hidden_size: int, head_dim: int, groups: tuple[int, ...]) -> None:
        super().__init__()
        self.head_dim, self.groups = head_dim, torch.tensor(groups)
        self.q_proj = nn.Linear(hidden_size, sum(groups) * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, len(groups) * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, len(groups) * head_dim, bias=False)
        self.o_proj = nn.Linear(sum(groups) * head_dim, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        k, v = (heads.repeat_interleave(self.groups, dim=1) for heads in (self.rotate(k), v))
        return self.o_proj(
            F.scaled_dot_product_attention(self.rotate(q), k, v, is_causal=True).transpose(1, 2).flatten(2)
        )

    def rotate(self, heads: torch.Tensor) -> torch.Tensor:
        positions, half = torch.arange(heads.shape[2]), self.head_dim // 2
        angles = positions[:, None] * 10000 ** (-torch.arange(half) / half)
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


class MoE(nn.Module):
    def __init__(self, hidden_size: int, widths: tuple[int, ...], shared_width: int, config: DeepseekConfig) -> None:
        super().__init__()
        self.top_k, self.renormalise = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = nn.Linear(hidden_size, len(widths), bias=False)
        self.experts = nn.ModuleList(MLP(hidden_size, width) if width else nn.Module() for width in widths)
        self.shared_experts = MLP(hidden_size, shared_width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(self.top_k, dim=-1)
        if self.renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        result = self.shared_experts(x)
        for index, expert in enumerate(self.experts):
            if isinstance(expert, MLP):
                result = result + expert(x) * (weights * (chosen == index)).sum(-1, keepdim=True)
        return result


class Layer(nn.Module):
    def __init__(self, geometry: ModelGeometry, layer: LayerGeometry, config: DeepseekConfig) -> None:
        super().__init__()
        hidden_size = geometry.hidden_size
        if layer.query_heads_per_kv_head:
            self.input_layernorm = Norm(hidden_size)
            self.self_attn = Attention(hidden_size, geometry.head_dim, layer.query_heads_per_kv_head)
        if layer.expert_intermediate_sizes:
            shared_width = geometry.experts.shared_intermediate_size
            self.mlp = MoE(hidden_size, layer.expert_intermediate_sizes, shared_width, config)
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


class DeepseekForCausalLM(nn.Module):
    """Called and saved as a model of Transformers, as far as the tests do it."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        self.config = config
        geometry = ModelGeometry.from_config(config.to_dict())
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(geometry.vocab_size, geometry.hidden_size)
        self.model.layers = nn.ModuleList(Layer(geometry, layer, config) for layer in geometry.layers)
        self.model.norm = Norm(geometry.hidden_size)
        self.lm_head = nn.Linear(geometry.hidden_size, geometry.vocab_size, bias=False)

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        x = self.model.embed_tokens(input_ids)
        for layer in self.model.layers:
            x = layer(x)
        return SimpleNamespace(logits=self.lm_head(self.model.norm(x)))

    def save_pretrained(self, directory: Path) -> None:
        self.config.save_pretrained(directory)
        save_file(self.state_dict(), directory / "model.safetensors", metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls, directory: Path) -> "DeepseekForCausalLM":
        """A dense or converted model; every tensor must fit."""
        model = cls(DeepseekConfig(**json.loads((directory / "config.json").read_text())))
        shards = [load_file(path) for path in directory.glob("*.safetensors")]
        model.load_state_dict({name: tensor for shard in shards for name, tensor in shard.items()})
        return model.eval().requires_grad_(False)
