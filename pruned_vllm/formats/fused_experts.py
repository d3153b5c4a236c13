"""Experts that a family stores as one tensor a layer, taken apart: where the numbers of each are. Pure Python.

gpt-oss ("interleaved") has in each layer, for E experts of I channels,

    mlp.experts.gate_up_proj       [E, hidden_size, 2 I]    W_gate and W_up transposed, their columns taking turns
    mlp.experts.gate_up_proj_bias  [E, 2 I]
    mlp.experts.down_proj          [E, I, hidden_size]      W_down transposed
    mlp.experts.down_proj_bias     [E, hidden_size]

so a row of W_gate is every second number of a column in the file. It is published with 4-bit numbers in MXFP4:

    mlp.experts.gate_up_proj_blocks  [E, 2 I, hidden_size / 32, 16]    not transposed, rows of gate and up taking turns
    mlp.experts.gate_up_proj_scales  [E, 2 I, hidden_size / 32]
    mlp.experts.down_proj_blocks     [E, hidden_size, I / 32, 16]
    mlp.experts.down_proj_scales     [E, hidden_size, I / 32]

Numbers of that kind are read as bfloat16, which has each of them.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.headers import PackedRows, StoredTensor, spread

_IN_NO_FILE = "lies in no file as a whole; save the model with save_pretrained of Transformers"


def unfused_experts(geometry: ModelGeometry, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """`tensors` with those of each expert in the place of fused ones. Nothing is read or copied.

    Raises:
        InputError: fused tensors do not have the shapes that config.json says, or lie in no file as a whole.
    """
    result, problems, names = dict(tensors), [], geometry.family.experts_format
    for index, layer in enumerate(geometry.layers):
        count, prefix = len(layer.expert_intermediate_sizes), f"model.layers.{index}.{names.module}.experts."
        sizes = layer.expert_width, geometry.hidden_size
        stored: tuple[_Plain | _Packed, ...] = (*_plain(*sizes), *_packed(*sizes))
        for fused in stored:
            found = {part: result.pop(prefix + part) for part in fused.tensors if prefix + part in result}
            if not found:
                continue
            if problem := fused.problem(found, count):
                problems.append(prefix + problem)
                continue
            for expert in range(count):
                modules = dict(zip(("gate", "up", "down"), names.modules_of(expert), strict=True))
                for part, tensor in fused.parts(found, expert):
                    projection, _, kind = part.partition(".")
                    own_name = f"model.layers.{index}.{modules[projection]}.{kind}"
                    if own_name in result:
                        problems.append(f"{own_name}: there as part of {prefix}{fused.name}, and by itself; keep one")
                    result[own_name] = tensor
    if problems:
        raise InputError(f"The fused experts of {geometry.family.architecture} do not fit config.json:", problems)
    return result


@dataclass(frozen=True)
class _Part:
    """A tensor of one expert inside of a fused one.

    Attributes:
        name: "gate.weight" and so on.
        first: the number that it begins with, counted in that of its expert.
        shape, strides: as in `StoredTensor`.
    """

    name: str
    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class _Plain:
    """A fused tensor of numbers.

    Attributes:
        shape: of one expert's part.
    """

    name: str
    shape: tuple[int, ...]
    members: tuple[_Part, ...]

    @property
    def tensors(self) -> tuple[str, ...]:
        return (self.name,)

    def problem(self, found: Mapping[str, StoredTensor], count: int) -> str | None:
        """What is wrong with it, in a model of so many experts."""
        tensor, expected = found[self.name], (count, *self.shape)
        if tensor.shape != expected:
            return f"{self.name}: the file has {list(tensor.shape)}, config.json says {list(expected)}"
        return f"{self.name}: {_IN_NO_FILE}" if tensor.span == (0, 0) else None

    def parts(self, found: Mapping[str, StoredTensor], expert: int) -> Iterator[tuple[str, StoredTensor]]:
        """The tensors of an expert."""
        tensor = found[self.name]
        start, end = tensor.span
        size = (end - start) // math.prod(tensor.shape)
        for part in self.members:
            length = spread(part.shape, part.strides) if part.strides else math.prod(part.shape)
            first = start + (expert * math.prod(self.shape) + part.first) * size
            span = (first, first + length * size)
            yield part.name, replace(tensor, shape=part.shape, span=span, strides=part.strides)


def _plain(width: int, hidden: int) -> Iterator[_Plain]:
    gate_and_up = tuple(enumerate(("gate", "up")))
    weights = (_Part(f"{name}.weight", first, (width, hidden), (2, 2 * width)) for first, name in gate_and_up)
    biases = (_Part(f"{name}.bias", first, (width,), (2,)) for first, name in gate_and_up)
    yield _Plain("gate_up_proj", (hidden, 2 * width), tuple(weights))
    yield _Plain("gate_up_proj_bias", (2 * width,), tuple(biases))
    yield _Plain("down_proj", (width, hidden), (_Part("down.weight", 0, (hidden, width), (1, hidden)),))
    yield _Plain("down_proj_bias", (hidden,), (_Part("down.bias", 0, (hidden,), ()),))


@dataclass(frozen=True)
class _Packed:
    """Two fused tensors that are weights in MXFP4.

    Attributes:
        rows, columns: of one expert's part.
        projections: whose rows take turns.
    """

    name: str
    rows: int
    columns: int
    projections: tuple[str, ...]

    @property
    def tensors(self) -> tuple[str, ...]:
        return f"{self.name}_blocks", f"{self.name}_scales"

    def problem(self, found: Mapping[str, StoredTensor], count: int) -> str | None:
        """What is wrong with them, in a model of so many experts."""
        if self.columns % 32:
            return f"{self.name}_blocks: config.json says rows of {self.columns} numbers, which are no blocks of 32"
        scales_shape = (count, self.rows, self.columns // 32)
        for name, expected in zip(self.tensors, ((*scales_shape, 16), scales_shape), strict=True):
            if name not in found:
                return f"{name} {list(expected)}: missing"
            tensor = found[name]
            if (tensor.shape, tensor.dtype) != (expected, "U8"):
                given = f"{list(tensor.shape)} in {tensor.dtype}"
                return f"{name}: the file has {given}, config.json says {list(expected)} in U8"
            if tensor.span == (0, 0):
                return f"{name}: {_IN_NO_FILE}"
        return None

    def parts(self, found: Mapping[str, StoredTensor], expert: int) -> Iterator[tuple[str, StoredTensor]]:
        """The tensors of an expert."""
        blocks, scales = (_bytes_of(found[name], expert) for name in self.tensors)
        turns = len(self.projections)
        for first, projection in enumerate(self.projections):
            rows = PackedRows(blocks, scales, first, turns)
            shape = (self.rows // turns, self.columns)
            yield f"{projection}.weight", replace(blocks, shape=shape, dtype="BF16", packed=rows)


def _packed(width: int, hidden: int) -> Iterator[_Packed]:
    yield _Packed("gate_up_proj", 2 * width, hidden, ("gate", "up"))
    yield _Packed("down_proj", hidden, width, ("down",))


def _bytes_of(tensor: StoredTensor, expert: int) -> StoredTensor:
    """One expert's bytes, as a matrix of as many rows."""
    _, rows, *others = tensor.shape
    start, size = tensor.span[0], rows * math.prod(others)
    span = (start + expert * size, start + (expert + 1) * size)
    return replace(tensor, shape=(rows, math.prod(others)), span=span)
