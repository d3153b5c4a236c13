"""Projections that a family stores as one tensor, taken apart: the rows of each part, where they lie. Pure Python.

Of one layer (`Family.fused`), or of all its experts (`ExpertsFormat.may_be_fused`): those lie expert by expert, the
rows of a matrix behind those of the one before, so that every part is a range of rows there, too.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.families import find_family
from pruned_vllm.formats.family import Family
from pruned_vllm.formats.fused_experts import unfused_experts
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.headers import StoredTensor

_EXPERTS_PARTS = {"gate_up_proj": (0, 1), "down_proj": (2,)}  # which of gate, up and down


def parts_of(family: Family, name: str, num_experts: int = 0) -> list[str]:
    """The tensors, by full name, whose rows make up a fused tensor; empty for a tensor that is not fused.

    "model.layers.0.mlp.gate_up_proj.weight" is "model.layers.0.mlp.gate_proj.weight" above that of up_proj.

    Args:
        num_experts: of a layer that has any.
    """
    if family.experts is not None and family.experts.may_be_fused:
        prefix, found, kind = name.partition(f".{family.experts.module}.experts.")
        if found and kind in _EXPERTS_PARTS:
            modules = [family.experts.modules_of(expert) for expert in range(num_experts)]
            return [f"{prefix}.{of_expert[part]}.weight" for of_expert in modules for part in _EXPERTS_PARTS[kind]]
    for fused, parts in family.fused:
        prefix, found, kind = name.partition(f".{fused}.")
        if found:
            return [f"{prefix}.{part}.{kind}" for part in parts]
    return []


def unfused(config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """`tensors` with the parts of fused ones in their place. Nothing is read or copied: a part is a range of rows, or
    what `unfused_experts` says.

    Raises:
        InputError: fused tensors do not have the rows that config.json says, or lie in no file as a whole.
    """
    family = find_family(config)
    if family.experts is not None and family.experts.fused and any(".experts.gate_up_proj" in name for name in tensors):
        tensors = unfused_experts(ModelGeometry.from_config(config), tensors)
    if not any(parts_of(family, name, num_experts=1) for name in tensors):
        return dict(tensors)
    geometry, result, problems = ModelGeometry.from_config(config), dict(tensors), []
    shapes, num_experts = geometry.tensor_shapes(), geometry.experts.num_experts if geometry.experts else 0
    fused = {name: parts for name in tensors if (parts := parts_of(family, name, num_experts))}
    for name, parts in fused.items():
        if not set(parts) <= shapes.keys():  # of layers that config.json does not count, which is reported later
            continue
        tensor, expected = tensors[name], (sum(shapes[part][0] for part in parts), *shapes[parts[0]][1:])
        if ".experts." in parts[0]:
            expected = (num_experts, expected[0] // num_experts, expected[1])
        if tensor.shape != expected:
            modules = ", ".join(dict.fromkeys(part.split(".")[-2] for part in parts))
            problems.append(
                f"{name}: the file has {list(tensor.shape)}, config.json says {list(expected)}, the rows of {modules}"
            )
        elif tensor.span == (0, 0):
            problems.append(f"{name}: lies in no file as a whole; save the model with save_pretrained of Transformers")
        elif doubled := [part for part in parts if part in tensors]:
            problems.append(f"{doubled[0]}: there as part of {name.removesuffix('.weight')}, and by itself; keep one")
        else:
            del result[name]
            result |= _rows(tensor, {part: shapes[part] for part in parts})
    if problems:
        raise InputError(f"The fused tensors of {family.architecture} do not fit config.json:", problems)
    return result


def _rows(tensor: StoredTensor, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, StoredTensor]:
    """Parts of these shapes, whose rows follow one another in `tensor`."""
    start, end = tensor.span
    row_bytes, parts = (end - start) // math.prod(tensor.shape[:-1]), {}
    for name, shape in shapes.items():
        end = start + shape[0] * row_bytes
        parts[name] = replace(tensor, shape=shape, span=(start, end))
        start = end
    return parts
