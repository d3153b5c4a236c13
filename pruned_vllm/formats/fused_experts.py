"""Experts that a family stores as one tensor a layer, taken apart: where the numbers of each are. Pure Python.

gpt-oss ("interleaved") has in each layer, for E experts of I channels,

    mlp.experts.gate_up_proj       [E, hidden_size, 2 I]    W_gate and W_up transposed, their columns taking turns
    mlp.experts.gate_up_proj_bias  [E, 2 I]
    mlp.experts.down_proj          [E, I, hidden_size]      W_down transposed
    mlp.experts.down_proj_bias     [E, hidden_size]

so a row of W_gate is every second number of a column in the file.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.headers import StoredTensor, spread


@dataclass(frozen=True)
class _Part:
    """A tensor of one expert inside of a fused one.

    Attributes:
        first: the number that it begins with, counted in that of its expert.
        shape, strides: as in `StoredTensor`.
    """

    name: str
    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def unfused_experts(geometry: ModelGeometry, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """`tensors` with those of each expert in the place of fused ones. Nothing is read or copied.

    Raises:
        InputError: fused tensors do not have the shapes that config.json says, or lie in no file as a whole.
    """
    result, problems = dict(tensors), []
    for index, layer in enumerate(geometry.layers):
        names = geometry.family.experts_format
        prefix, count = f"model.layers.{index}.", len(layer.expert_intermediate_sizes)
        for fused, shape, parts in _interleaved(layer.expert_width, geometry.hidden_size):
            name = f"{prefix}{names.module}.experts.{fused}"
            if name not in tensors:
                continue
            tensor = result.pop(name)
            if tensor.shape != (count, *shape):
                problems.append(f"{name}: the file has {list(tensor.shape)}, config.json says {[count, *shape]}")
            elif tensor.span == (0, 0):
                problems.append(f"{name}: lies in no file as a whole; save the model with save_pretrained")
            for expert in range(0 if problems else count):
                modules = dict(zip(("gate", "up", "down"), names.modules_of(expert), strict=True))
                for part in parts:
                    projection, _, kind = part.name.partition(".")
                    own_name = f"{prefix}{modules[projection]}.{kind}"
                    if own_name in tensors:
                        problems.append(f"{own_name}: there as part of {name}, and by itself; keep one")
                    result[own_name] = _view(tensor, expert * math.prod(shape), part)
    if problems:
        raise InputError(f"The fused experts of {geometry.family.architecture} do not fit config.json:", problems)
    return result


def _interleaved(width: int, hidden: int) -> Iterator[tuple[str, tuple[int, ...], list[_Part]]]:
    """Name, shape of one expert's part, and parts of each fused tensor."""
    gate_and_up = tuple(enumerate(("gate", "up")))
    weights = [_Part(f"{name}.weight", first, (width, hidden), (2, 2 * width)) for first, name in gate_and_up]
    yield "gate_up_proj", (hidden, 2 * width), weights
    yield "gate_up_proj_bias", (2 * width,), [_Part(f"{name}.bias", at, (width,), (2,)) for at, name in gate_and_up]
    yield "down_proj", (width, hidden), [_Part("down.weight", 0, (hidden, width), (1, hidden))]
    yield "down_proj_bias", (hidden,), [_Part("down.bias", 0, (hidden,), ())]


def _view(tensor: StoredTensor, first: int, part: _Part) -> StoredTensor:
    """The part of the expert whose numbers begin with number `first` of `tensor`."""
    start, end = tensor.span
    size = (end - start) // math.prod(tensor.shape)
    length = spread(part.shape, part.strides) if part.strides else math.prod(part.shape)
    start += (first + part.first) * size
    return replace(tensor, shape=part.shape, span=(start, start + length * size), strides=part.strides)
