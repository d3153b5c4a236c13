"""What llama.cpp computes from a GGUF file, written out in float32 from its sources (src/models/*.cpp), as an oracle.

GgufModel(path).logits([1, 2, 3])      # [3, vocab]
"""

import math
from pathlib import Path

import torch
from gguf import GGMLQuantizationType, GGUFReader

NEIGHBOURS = ("llama", "deci")  # architectures whose RoPE turns elements 2i and 2i + 1 (llama_model_rope_type)


class GgufModel:
    def __init__(self, path: Path) -> None:
        reader = GGUFReader(path)
        self.metadata = {name: field.contents() for name, field in reader.fields.items()}
        self.architecture = self.metadata["general.architecture"]
        self.tensors = {tensor.name: _floats(tensor) for tensor in reader.tensors}
        self.kinds = {tensor.name: tensor.tensor_type for tensor in reader.tensors}

    def size(self, key: str, layer: int | None = None):
        """A number of the metadata; of a layer where it is a list."""
        value = self.metadata[f"{self.architecture}.{key}"]
        return value[layer] if isinstance(value, list) else value

    @torch.no_grad()
    def logits(self, tokens: list[int]) -> torch.Tensor:
        hidden = self.tensors["token_embd.weight"][tokens]
        for layer in range(self.size("block_count")):
            hidden = hidden + self._attention(layer, self._norm(hidden, f"blk.{layer}.attn_norm"))
            normed = self._norm(hidden, f"blk.{layer}.ffn_norm")
            gate = self._linear(normed, f"blk.{layer}.ffn_gate", self.size("feed_forward_length", layer))
            up = self._linear(normed, f"blk.{layer}.ffn_up", self.size("feed_forward_length", layer))
            hidden = hidden + self._linear(gate * gate.sigmoid() * up, f"blk.{layer}.ffn_down")
        head = "output" if "output.weight" in self.tensors and self.architecture != "openelm" else "token_embd"
        return self._linear(self._norm(hidden, "output_norm"), head)

    def _linear(self, values: torch.Tensor, name: str, rows: int | None = None) -> torch.Tensor:
        weight = self.tensors[f"{name}.weight"]
        assert rows is None or len(weight) == rows, f"{name} has {len(weight)} rows, the metadata says {rows}"
        result = values @ weight.T
        return result + self.tensors[f"{name}.bias"] if f"{name}.bias" in self.tensors else result

    def _norm(self, values: torch.Tensor, name: str) -> torch.Tensor:
        epsilon = self.size("attention.layer_norm_rms_epsilon")
        return values * torch.rsqrt(values.square().mean(-1, keepdim=True) + epsilon) * self.tensors[f"{name}.weight"]

    def _attention(self, layer: int, values: torch.Tensor) -> torch.Tensor:
        block, dim = f"blk.{layer}", self.size("attention.key_length")
        heads, kv_heads = self.size("attention.head_count", layer), self.size("attention.head_count_kv", layer)
        if self.architecture == "openelm":
            fused = self._linear(values, f"{block}.attn_qkv", (heads + 2 * kv_heads) * dim)
            q, k, v = fused.split([heads * dim, kv_heads * dim, kv_heads * dim], dim=-1)
        else:
            q = self._linear(values, f"{block}.attn_q", heads * dim)
            k, v = (self._linear(values, f"{block}.attn_{name}", kv_heads * dim) for name in "kv")
        q, k, v = (part.unflatten(-1, (-1, dim)) for part in (q, k, v))  # [tokens, heads, dim]
        if f"{block}.attn_q_norm.weight" in self.tensors:
            q, k = self._norm(q, f"{block}.attn_q_norm"), self._norm(k, f"{block}.attn_k_norm")
        q, k = self._rope(q), self._rope(k)
        k, v = (part.repeat_interleave(heads // kv_heads, dim=1) for part in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(dim)
        future = torch.ones(len(values), len(values), dtype=torch.bool).triu(1)
        mixed = torch.einsum("hqk,khd->qhd", scores.masked_fill(future, -torch.inf).softmax(-1), v)
        return self._linear(mixed.flatten(1), f"{block}.attn_output")

    def _rope(self, values: torch.Tensor) -> torch.Tensor:
        dim = self.size("rope.dimension_count")
        assert dim == values.shape[-1]
        position = torch.arange(len(values)) / self.metadata.get(f"{self.architecture}.rope.scaling.factor", 1.0)
        frequency = self.size("rope.freq_base") ** (-torch.arange(0, dim, 2) / dim)
        if "rope_freqs.weight" in self.tensors and self.architecture in NEIGHBOURS:  # others do not read it
            frequency = frequency / self.tensors["rope_freqs.weight"]
        angle = (position[:, None] * frequency)[:, None]
        pairs = values.unflatten(-1, (-1, 2)) if self.architecture in NEIGHBOURS else _halves(values)
        first, second = pairs.unbind(-1)
        turned = [first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos()]
        return torch.stack(turned, -1).flatten(-2) if self.architecture in NEIGHBOURS else torch.cat(turned, -1)


def _halves(values: torch.Tensor) -> torch.Tensor:
    return torch.stack(values.chunk(2, dim=-1), -1)


def _floats(tensor) -> torch.Tensor:
    data = torch.from_numpy(tensor.data.copy())
    if tensor.tensor_type == GGMLQuantizationType.BF16:
        data = data.view(torch.bfloat16)
    return data.float()
