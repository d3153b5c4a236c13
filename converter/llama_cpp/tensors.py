"""The tensors of a GGUF file: which there are, and what is in each.

RoPE of some architectures turns neighbours in a head where Transformers turns its two halves; their q and k have the
rows of each head in another order. Norms and biases are float32, matrices what they are in the checkpoint.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from converter.checkpoint import TORCH_DTYPES, Checkpoint
from converter.fold import Cut, cut_layer
from converter.llama_cpp.layout import Layout
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.masked import LayerMasks

MODEL_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
MODULE_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
FUSED = "attn_qkv"
QKV, ROTATED = (".q_proj.", ".k_proj.", ".v_proj."), (".q_proj.", ".k_proj.")


@dataclass(frozen=True)
class GgufTensor:
    """One tensor.

    Attributes:
        name: in the file.
        parts: names in the checkpoint, of tensors whose rows follow each other.
        shape: in rows and columns, as torch has it.
        dtype: float32, float16 or bfloat16.
    """

    name: str
    parts: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype


class TensorMaker:
    """The tensors of a checkpoint in a layout.

    maker = TensorMaker(checkpoint, geometry, layout)
    for tensor in maker.tensors():
        maker.read(tensor)
    """

    def __init__(self, checkpoint: Checkpoint, geometry: ModelGeometry, layout: Layout) -> None:
        """Args: geometry: of the checkpoint."""
        self._checkpoint, self._layout = checkpoint, layout
        self._shapes = layout.geometry.tensor_shapes()
        self._cuts: dict[str, Cut] = {}
        for index, (layer, target) in enumerate(zip(geometry.layers, layout.geometry.layers, strict=True)):
            there = replace(  # what is gone is made of zeros, not of cuts
                target,
                query_heads_per_kv_head=layer.query_heads_per_kv_head and target.query_heads_per_kv_head,
                intermediate_size=layer.intermediate_size and target.intermediate_size,
            )
            cuts = cut_layer(geometry, layer, LayerMasks(), "product", there)
            self._cuts |= {f"model.layers.{index}.{name}": cut for name, cut in cuts.items()}

    def tensors(self) -> Iterator[GgufTensor]:
        """In the order of the forward pass. Biases that are all zeros are left out: some releases know no others."""
        for name, shape in self._shapes.items():
            if name.endswith(".bias") and not self._read(name).any():
                continue
            dtype = self._dtype(name) if len(shape) == 2 else torch.float32
            if not (self._layout.architecture.fuses_qkv and any(part in name for part in QKV)):
                yield GgufTensor(gguf_name(name), (name,), shape, dtype)
            elif ".q_proj." in name:
                parts = tuple(name.replace("q_proj", part) for part in ("q_proj", "k_proj", "v_proj"))
                rows = sum(self._shapes[part][0] for part in parts)
                fused = gguf_name(name).replace("attn_q", FUSED)
                yield GgufTensor(fused, parts, (rows, *shape[1:]), dtype)

    def read(self, tensor: GgufTensor) -> torch.Tensor:
        """Loads one. Raises AssertionError where it has not the shape that it was to have."""
        read = torch.cat([self._read(name) for name in tensor.parts]).to(tensor.dtype).contiguous()
        if tuple(read.shape) != tensor.shape:
            raise AssertionError(f"{tensor.name}: {list(read.shape)}, the layout says {list(tensor.shape)}")
        return read

    def _dtype(self, name: str) -> torch.dtype:
        """Of a matrix; what is not in the checkpoint has the one of the embedding. llama.cpp has no float64."""
        stored = self._checkpoint.tensors.get(name, self._checkpoint.tensors["model.embed_tokens.weight"])
        dtype = TORCH_DTYPES[stored.dtype]
        return torch.float32 if dtype == torch.float64 else dtype

    def _read(self, name: str) -> torch.Tensor:
        if name not in self._checkpoint.tensors:  # of a sublayer that is gone
            return torch.zeros(self._shapes[name], dtype=self._dtype(name))
        tensor = self._checkpoint.read(name)
        if name in self._cuts:
            tensor = self._cuts[name].apply(tensor)
        if self._layout.architecture.rotates_neighbours and any(part in name for part in ROTATED):
            tensor = _with_neighbours(tensor, self._layout.geometry.head_dim)
        return tensor


def gguf_name(name: str) -> str:
    """The name in the file of a tensor of the checkpoint."""
    if name in MODEL_NAMES:
        return MODEL_NAMES[name]
    _, _, index, rest = name.split(".", 3)
    module, _, kind = rest.rpartition(".")
    return f"blk.{index}.{MODULE_NAMES[module]}.{kind}"


def _with_neighbours(tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The rows of each head, so that those which RoPE turns together are neighbours."""
    halves = tensor.unflatten(0, (-1, 2, head_dim // 2))  # heads, half, place in it
    return halves.transpose(1, 2).reshape(tensor.shape)
