"""Heads, channels and hidden dimensions whose weights are exactly zero: without them the model computes the same.

- A query head adds nothing where its columns of o_proj are zero, or the rows of v_proj (and the bias) of its KV head.
- A channel adds nothing where its column of down_proj is zero, or its row of up_proj, or its row of gate_proj: SiLU of
  0 is 0. A bias that is not zero keeps a row alive. In gpt-oss, whose product is one of up + 1, the row of up_proj does
  not count.
- A hidden dimension stays zero where its column of the embedding is zero, and every row of o_proj and of down_proj that
  adds to it, with their biases.

Every tensor is read once. What is kept of it is which of its rows and columns are zero, told by the bits of its
numbers: NumPy does that faster than a disk delivers them, while comparing them takes Torch ten times as long.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch

from converter.checkpoint import Checkpoint
from converter.hidden import EMBEDDING, is_output
from pruned_vllm.common.progress import progress_bar
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.layer import LayerGeometry
from pruned_vllm.formats.masked import LayerMasks

BLOCK = 1 << 20  # numbers that are looked at at a time, few enough for the cache of a core
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a number; NumPy has no bfloat16
_SCANNED = ("v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


@dataclass(frozen=True)
class ZeroUnits:
    """What was found.

    Attributes:
        masks: of each layer, 0 for units that add nothing; None where there are none.
        hidden: float32 [hidden_size], 0 for dimensions that stay zero; None where there are none.
        share: zeros among the weights of layers that were read.
        notes: sentences about units that are zero and stay nevertheless.
    """

    masks: list[LayerMasks[torch.Tensor]]
    hidden: torch.Tensor | None
    share: float
    notes: tuple[str, ...]

    @property
    def has_masks(self) -> bool:
        """Whether there are heads or channels that add nothing."""
        return any(value is not None for masks in self.masks for value in (masks.head, masks.channel, masks.expert))


def find_zero_units(weights: Checkpoint, geometry: ModelGeometry, names: Collection[str] | None = None) -> ZeroUnits:
    """Looks for zeros in a model.

    Args:
        geometry: the sizes that the tensors have; all of them are there.
        names: the weights to look at; None is all. Others count as if they had no zeros.
    """
    scan = _Scan(weights)
    wanted = [name for name in geometry.tensor_shapes() if _is_scanned(name) and (names is None or name in names)]
    for name in progress_bar(wanted, desc="looking for zeros", unit=" tensors"):
        scan.read(name)
    notes: list[str] = []
    masks = [_layer_masks(scan, geometry, index, notes) for index in range(len(geometry.layers))]
    share = 1 - scan.nonzeros / max(scan.numbers, 1)
    return ZeroUnits(masks, _hidden_mask(scan, geometry), share, tuple(dict.fromkeys(notes)))


class _Scan:
    """Which rows and columns of the tensors that were read hold anything but zeros."""

    def __init__(self, weights: Checkpoint) -> None:
        self._weights = weights
        self._rows: dict[str, torch.Tensor] = {}
        self._columns: dict[str, torch.Tensor] = {}
        self.numbers = self.nonzeros = 0

    def read(self, name: str) -> None:
        weight = self._weights.read(name)
        bits = weight.view(_INTEGERS[weight.dtype.itemsize]).numpy()
        magnitude = np.iinfo(bits.dtype).max  # all but the sign: -0.0 is zero too
        rows, columns = [], np.zeros(bits.shape[1], bits.dtype)
        count = max(1, BLOCK // max(1, bits.shape[1]))
        for start in range(0, max(1, len(bits)), count):
            block = bits[start : start + count] & magnitude
            rows.append(np.bitwise_or.reduce(block, axis=1))
            columns |= np.bitwise_or.reduce(block, axis=0)
            if name != EMBEDDING:
                self.numbers += block.size
                self.nonzeros += int(np.count_nonzero(block))
        self._rows[name], self._columns[name] = (
            torch.from_numpy(np.concatenate(rows) != 0),
            torch.from_numpy(columns != 0),
        )

    def has_read(self, name: str) -> bool:
        return name in self._rows

    def rows(self, module: str) -> torch.Tensor:
        """Whether each output of a linear layer can be anything but zero."""
        name = f"{module}.weight"
        if name not in self._rows:
            return torch.ones(self._weights.tensors[name].shape[0], dtype=torch.bool)
        bias = f"{module}.bias"
        return self._rows[name] | (self._weights.read(bias) != 0) if bias in self._weights.tensors else self._rows[name]

    def columns(self, module: str) -> torch.Tensor:
        """Whether each input of a linear layer, or each dimension of an embedding, counts."""
        name = f"{module}.weight"
        used = self._columns.get(name)
        return torch.ones(self._weights.tensors[name].shape[1], dtype=torch.bool) if used is None else used


def _is_scanned(name: str) -> bool:
    return name == EMBEDDING or any(name.endswith(f".{projection}.weight") for projection in _SCANNED)


def _layer_masks(scan: _Scan, geometry: ModelGeometry, index: int, notes: list[str]) -> LayerMasks[torch.Tensor]:
    layer, prefix, family = geometry.layers[index], f"model.layers.{index}.", geometry.family
    head = channel = expert = None
    if layer.query_heads_per_kv_head and geometry.latent is None:
        head = _mask(_used_heads(scan, prefix, layer, geometry.head_dim))
        if head is not None and head.any() and not family.can_lose_heads:
            notes.append(f"Some heads are zero, but stay: {family.architecture} {family.why_heads_stay}")
            head = None
    if layer.intermediate_size:
        mlp = prefix + family.mlp_of(layer)
        channel = _mask(_used_channels(scan, *(f"{mlp}.{name}_proj" for name in ("gate", "up", "down"))))
    if layer.expert_width:
        names, used = family.experts_format, []
        for number in range(len(layer.expert_intermediate_sizes)):
            gate, up, down = (prefix + module for module in names.modules_of(number))
            # Where the product is one of up + 1, a row of zeros in W_up leaves something.
            used.append(_used_channels(scan, gate, up if names.is_linear_in_up else gate, down))
        expert = _mask(torch.stack(used))
    return LayerMasks(head, channel, expert)


def _used_heads(scan: _Scan, prefix: str, layer: LayerGeometry, head_dim: int) -> torch.Tensor:
    values = scan.rows(f"{prefix}self_attn.v_proj").view(-1, head_dim).any(1)
    used = scan.columns(f"{prefix}self_attn.o_proj").view(-1, head_dim).any(1)
    return used & values.repeat_interleave(torch.tensor(layer.query_heads_per_kv_head))


def _used_channels(scan: _Scan, gate: str, up: str, down: str) -> torch.Tensor:
    return scan.rows(gate) & scan.rows(up) & scan.columns(down)


def _hidden_mask(scan: _Scan, geometry: ModelGeometry) -> torch.Tensor | None:
    if not scan.has_read(EMBEDDING):
        return None
    used = scan.columns(EMBEDDING.removesuffix(".weight"))
    for name in geometry.tensor_shapes():
        if is_output(name) and name.endswith(".weight") and not used.all():
            used = used | scan.rows(name.removesuffix(".weight"))
    return _mask(used)


def _mask(used: torch.Tensor) -> torch.Tensor | None:
    return None if bool(used.all()) else used.float()
