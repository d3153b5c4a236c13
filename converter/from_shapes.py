"""Sizes of layers that were cut already, told by the shapes of their tensors, whatever config.json says of them.

A sublayer whose weights are absent or have no rows is gone. What is left of it goes too (its norm has nothing to do),
but not the bias that it ends in: `o_proj.bias` and `down_proj.bias` are added to the hidden states whatever was cut.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from converter.checkpoint import TORCH_DTYPES, Checkpoint
from converter.cut_config import SIZE_LISTS, num_experts
from converter.hidden import EMBEDDING
from pruned_vllm.formats.biases import complete_biases
from pruned_vllm.formats.config import read_config
from pruned_vllm.formats.family import Family
from pruned_vllm.formats.fused import unfused
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.headers import StoredTensor, count_problems, read_headers, without_draft_layers
from pruned_vllm.formats.layer import LayerGeometry
from pruned_vllm.formats.weights import has_weight_files

_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
OTHER_HEAD_DIM = "If it was another before pruning, give the dense model with --base-model"


@dataclass
class CutLayers:
    """What the shapes say.

    Attributes:
        layers: the sizes of every layer.
        leftovers: names of tensors that belong to sublayers that are gone.
        problems: shapes that contradict each other; layers then are not to be used.
    """

    layers: list[LayerGeometry] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def shapes_differ(directory: Path) -> bool | None:
    """Whether a model directory has tensors of other shapes than its config.json says, told by the headers alone.

    None where it is no model directory with safetensors. Raises InputError where its files cannot be read.
    """
    if not (directory / "config.json").is_file() or not has_weight_files(directory):
        return None
    config = read_config(directory)
    config, tensors = complete_biases(config, unfused(config, without_draft_layers(config, read_headers(directory))))
    stated = ModelGeometry.from_config(config)
    if any(key in config for key in SIZE_LISTS) or count_problems(tensors, stated):
        return True
    return any(
        tensors[name].shape != shape if name in tensors else name.startswith("model.layers.")
        for name, shape in stated.tensor_shapes().items()
    )


def layers_from_shapes(tensors: Mapping[str, StoredTensor], dense: ModelGeometry) -> CutLayers:
    """Reads the sizes of every layer of `dense` from the tensors by full name; absent layers do nothing at all."""
    found = CutLayers()
    for index, layer in enumerate(dense.layers):
        prefix = f"model.layers.{index}."
        reader = _LayerReader(prefix, tensors, dense, found)
        if layer.linear_attention:
            groups: tuple[int, ...] = ()
        elif dense.latent is None:
            groups = reader.attention()
        else:  # all heads or none; the shapes are compared later
            groups = layer.query_heads_per_kv_head if reader.has(f"{prefix}self_attn.") else ()
        if not groups and not layer.linear_attention:
            reader.drop_norms(dense.family, "attention")
        if layer.expert_intermediate_sizes:
            count = num_experts(tensors, dense, index)
            if count is None:  # which is reported later
                count = dense.dense_experts.num_experts
            if count < dense.dense_experts.num_experts_per_tok:
                found.problems.append(f"model.layers.{index}: {dense.dense_experts.too_few(count)}")
            experts = tuple(reader.mlp(dense.family.experts_format.modules_of(expert)) for expert in range(count))
            shared = 0
            if layer.intermediate_size:
                mlp = dense.family.mlp_of(layer)
                shared = reader.mlp((f"{mlp}.gate_proj", f"{mlp}.up_proj", f"{mlp}.down_proj"))
            found.layers.append(LayerGeometry(groups, shared, experts, linear_attention=layer.linear_attention))
        else:
            width = reader.mlp(_MLP)
            if not width:
                reader.drop_norms(dense.family, "mlp")
            found.layers.append(LayerGeometry(groups, width, linear_attention=layer.linear_attention))
    return found


def too_many_heads(layers: Sequence[LayerGeometry], stated: ModelGeometry) -> list[str]:
    """Where layers have more heads than the config.json that head_dim was derived from: then it was another one.

    Pruning that shrank the hidden size may have left head_dim and the number of heads, and config.json says neither.
    """
    heads = stated.dense_layers[0].num_attention_heads
    return [
        f"model.layers.{index}.self_attn: {layer.num_attention_heads} heads of head_dim {stated.head_dim} (hidden_size "
        f"/ num_attention_heads), but config.json says {heads}. {OTHER_HEAD_DIM}"
        for index, layer in enumerate(layers)
        if layer.num_attention_heads > heads
    ]


def with_last_biases(weights: Checkpoint, geometry: ModelGeometry) -> Checkpoint:
    """`weights` with zeros for the last bias of sublayers that are gone with their bias, in a model that has such."""
    names = [
        f"model.layers.{index}.{name}"
        for index, layer in enumerate(geometry.layers)
        for name, is_gone in (
            ("self_attn.o_proj.bias", geometry.o_bias and "attention" in layer.skip),
            ("mlp.down_proj.bias", geometry.mlp_bias and "mlp" in layer.skip),
        )
        if is_gone and f"model.layers.{index}.{name}" not in weights.tensors
    ]
    if not names or EMBEDDING not in weights.tensors:  # which is reported later
        return weights
    embedding = weights.tensors[EMBEDDING]
    dtype = TORCH_DTYPES.get(embedding.dtype)
    zeros = {name: torch.zeros(geometry.hidden_size, dtype=dtype) for name in names}
    return weights.replaced({embedding.file: zeros})


class _LayerReader:
    def __init__(
        self, prefix: str, tensors: Mapping[str, StoredTensor], dense: ModelGeometry, found: CutLayers
    ) -> None:
        self._prefix, self._tensors, self._head_dim, self._found = prefix, tensors, dense.head_dim, found
        self._query_rows = dense.family.query_rows(dense.head_dim)

    def has(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self._tensors)

    def attention(self) -> tuple[int, ...]:
        """Query heads of each KV head."""
        q, k, v, o = self._sizes(_ATTENTION, axes=(0, 0, 0, 1))
        if not (q and k and v and o):
            if q or k or v or o:
                self._contradiction(_ATTENTION, (q, k, v, o))
            self._drop_modules(_ATTENTION)
            return ()
        if q * self._head_dim != o * self._query_rows or k != v or o % self._head_dim or k % self._head_dim:
            self._contradiction(_ATTENTION, (q, k, v, o), f"; head_dim is {self._head_dim}. {OTHER_HEAD_DIM}")
            return ()
        heads, kv_heads = o // self._head_dim, k // self._head_dim
        if heads % kv_heads:
            self._found.problems.append(
                f"{self._prefix}self_attn: {heads} query heads for {kv_heads} KV heads; which of them belong together "
                "cannot be told from shapes, so it needs per_layer_config with query_heads_per_kv_head"
            )
            return ()
        return (heads // kv_heads,) * kv_heads

    def mlp(self, modules: tuple[str, str, str]) -> int:
        """FFN channels of a gated MLP."""
        sizes = self._sizes(modules, axes=(0, 0, 1))
        if not all(sizes):
            if any(sizes):
                self._contradiction(modules, sizes)
            self._drop_modules(modules)
            return 0
        if len(set(sizes)) > 1:
            self._contradiction(modules, sizes)
        return sizes[0]

    def drop_norms(self, family: Family, sublayer: str) -> None:
        self.drop(*(f"{norm}.weight" for norm in family.norms_of(sublayer)))

    def drop(self, *names: str) -> None:
        self._found.leftovers += [self._prefix + name for name in names if self._prefix + name in self._tensors]

    def _drop_modules(self, modules: tuple[str, ...]) -> None:
        self.drop(*(f"{module}.weight" for module in modules), *(f"{module}.bias" for module in modules[:-1]))

    def _sizes(self, modules: tuple[str, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
        """The size of each module's weight along its axis; 0 where there is none, or nothing in it."""
        sizes = []
        for module, axis in zip(modules, axes, strict=True):
            name = f"{self._prefix}{module}.weight"
            shape = self._tensors[name].shape if name in self._tensors else (0, 0)
            if len(shape) != 2:
                self._found.problems.append(f"{name}: shape {list(shape)}; a weight has two dimensions")
            sizes.append(shape[axis] if len(shape) == 2 else 0)
        return tuple(sizes)

    def _contradiction(self, modules: tuple[str, ...], sizes: tuple[int, ...], more: str = "") -> None:
        names = ", ".join(module.rpartition(".")[2] for module in modules)
        self._found.problems.append(
            f"{self._prefix}{modules[0].rpartition('.')[0]}: {names} have {', '.join(map(str, sizes))} rows or "
            f"columns, which do not belong together{more}"
        )
