"""Decides which layers are quantized and what is written of each. Pure Python.

lm_head, embeddings, norms, biases, linear attention, routers and the gates of shared experts stay as they are.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from converter.quantize.schemes import Scheme, Wanted
from converter.quantize.sizes import choose_group_size, padded_sizes, size_problems
from converter.writer import WRITTEN_BYTES
from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.quantization import is_named
from pruned_vllm.formats.quantized_tensors import joined_modules
from pruned_vllm.formats.tensors import Shapes


@dataclass(frozen=True)
class Written:
    """Tensors of the files: shapes and dtypes by name, and the stored tensor that each is made of."""

    shapes: Shapes
    dtypes: dict[str, str]
    origins: dict[str, str]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes by name."""
        return {name: WRITTEN_BYTES[self.dtypes[name]] * math.prod(shape) for name, shape in self.shapes.items()}


@dataclass(frozen=True)
class Quantization:
    """How a model is quantized.

    Attributes:
        group_size: inputs that share a scale; None is a scale for each output.
        ignore: what compressed-tensors must leave alone, as `Wanted.ignore` says it.
        modules: the linear layers that are quantized, by full name.
        unpadded: the sizes without what this padded.
    """

    scheme: Scheme
    group_size: int | None
    ranks: int
    ignore: tuple[str, ...]
    modules: frozenset[str]
    unpadded: ModelGeometry

    def quantizes(self, tensor: str) -> bool:
        """Whether a tensor of this name is rounded."""
        return tensor.endswith(".weight") and tensor.removesuffix(".weight") in self.modules

    def written(self, shapes: Shapes, dtypes: Mapping[str, str]) -> Written:
        """The tensors of the files, of a model with tensors of these shapes and dtypes."""
        found = Written({}, {}, {})
        for name, shape in shapes.items():
            tensors = {name: (shape, dtypes[name])}
            if self.quantizes(name):
                tensors = {f"{name}{suffix}": about for suffix, about in self._parts(shape, dtypes[name]).items()}
            for part, (part_shape, dtype) in tensors.items():
                found.shapes[part], found.dtypes[part], found.origins[part] = part_shape, dtype, name
        return found

    def _parts(self, shape: tuple[int, ...], dtype: str) -> dict[str, tuple[tuple[int, ...], str]]:
        """What a weight becomes, by what is added to its name. Scales have the dtype that the weight had."""
        rows, columns = shape
        scales = {"_scale": ((rows, columns // self.group_size if self.group_size else 1), scale_dtype(dtype))}
        if not self.scheme.is_packed:
            return {"": (shape, self.scheme.dtype), **scales}
        packed = (rows, -(-columns // self.scheme.pack_factor))
        return {"_packed": (packed, self.scheme.dtype), **scales, "_shape": ((2,), "I64")}


def scale_dtype(dtype: str) -> str:
    """Of the scales of a weight that has this dtype: the same, as llm-compressor does it, but no more than float32."""
    return "F32" if dtype == "F64" else dtype


def plan_quantization(wanted: Wanted, geometry: ModelGeometry) -> tuple[Quantization, ModelGeometry]:
    """How a model of this geometry is quantized, and the geometry that it then has.

    Raises:
        InputError: with every layer that no kernel takes, and every problem of the options.
    """
    linears = _linear_modules(geometry)
    if problems := _ignore_problems(wanted.ignore, geometry, linears):
        raise InputError("These layers cannot stay as they are:", problems)
    modules = frozenset(name for name in linears if not any(is_named(pattern, (name,)) for pattern in wanted.ignore))
    if not modules:
        raise InputError("There is no layer to quantize: --ignore names all that the model has")
    group_size, problems = choose_group_size(wanted, geometry, modules)
    padded = padded_sizes(wanted, group_size, geometry, modules)
    problems += size_problems(wanted, group_size, padded, modules)
    if problems:
        raise InputError(f"The model cannot be quantized to {wanted.scheme.name}:", problems)
    kept = ("lm_head", *_kept_modules(geometry))
    ignore = tuple(dict.fromkeys((*kept, *wanted.ignore)))
    return Quantization(wanted.scheme, group_size, wanted.ranks, ignore, modules, geometry), padded


def _linear_modules(geometry: ModelGeometry) -> tuple[str, ...]:
    """Full names of the linear layers that can be quantized."""
    kept = set(_kept_modules(geometry))
    names = (
        name.removesuffix(".weight")
        for index in range(len(geometry.layers))
        for name, shape in geometry.layer_tensor_shapes(index).items()
        if len(shape) == 2
    )
    return tuple(name for name in names if name not in kept)


def _kept_modules(geometry: ModelGeometry) -> Iterator[str]:
    """Routers and gates of shared experts, linear attention, and what vLLM multiplies into q and the output of latent
    attention."""
    for index, layer in enumerate(geometry.layers):
        if layer.linear_attention:
            shapes = geometry.gated_delta_net.tensor_shapes(geometry.hidden_size)
            linear = (name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2)
            yield from (f"model.layers.{index}.{module}" for module in linear)
        if geometry.latent is not None and layer.query_heads_per_kv_head:
            yield f"model.layers.{index}.self_attn.kv_b_proj"
        if layer.expert_intermediate_sizes:
            names = geometry.family.experts_format
            yield from (f"model.layers.{index}.{module}" for module in (names.router, names.shared_gate) if module)


def _ignore_problems(patterns: Sequence[str], geometry: ModelGeometry, linears: Sequence[str]) -> list[str]:
    problems = []
    for pattern in patterns:
        try:
            if not any(is_named(pattern, (name,)) for name in (*linears, "lm_head", *_kept_modules(geometry))):
                first = linears[0] if linears else "lm_head"
                problems.append(f"--ignore {pattern}: no linear layer has such a name; the first is {first}")
        except re.error as error:
            return [f"--ignore {pattern}: no regular expression: {error}"]
    for together in joined_modules(geometry):
        stay = [name for name in together if any(is_named(pattern, (name,)) for pattern in patterns)]
        if stay and len(stay) < len(together):
            rest = next(name for name in together if name not in stay)
            problems.append(
                f"--ignore leaves {stay[0]} as it is, but not {rest}: vLLM computes them together, so name all or none"
            )
    return problems
