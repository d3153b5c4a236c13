"""Reads pruning_masks.safetensors, the masks of a masked checkpoint."""

import re
from collections.abc import Iterable
from pathlib import Path

import torch

from converter.mask_values import lost_heads, not_finite
from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.headers import ELEMENT_BYTES
from pruned_vllm.formats.masked import HEAD_MASK, MASKS_FILE, LayerMasks, layer_masks, mask_shapes
from pruned_vllm.formats.weights import open_safetensors


def read_masks(directory: Path, geometry: ModelGeometry) -> list[LayerMasks[torch.Tensor]]:
    """Reads and checks the masks for a dense model of this geometry, in float32.

    Raises:
        InputError: with every unknown key, wrong shape or dtype, value that is NaN or infinite, and head that the
            family cannot lose.
    """
    path = directory / MASKS_FILE
    shard = open_safetensors(path, "pt")
    expected = mask_shapes(geometry)
    linear = {HEAD_MASK.format(index) for index, layer in enumerate(geometry.layers) if layer.linear_attention}
    masks: dict[str, torch.Tensor] = {}
    problems = []
    for name in sorted(shard.keys()):
        header = shard.get_slice(name)
        shape = tuple(header.get_shape())
        if name not in expected and name in linear:
            problems.append(
                f"{name}: the layer has linear attention, and vLLM has one shape of state for all layers of a model; "
                "heads can go from layers with full attention alone"
            )
        elif name not in expected:
            problems.append(
                f"{name}: unknown key; known: {_describe_keys(expected)} for layers 0 to {len(geometry.layers) - 1}"
            )
        elif shape != expected[name]:
            problems.append(f"{name}: shape {list(shape)}, the model needs {list(expected[name])}")
        elif header.get_dtype() not in ELEMENT_BYTES:
            problems.append(f"{name}: dtype {header.get_dtype()}; masks are floating point")
        else:
            masks[name] = shard.get_tensor(name).float()
            if bad := not_finite(masks[name]):
                problems.append(f"{name}: {bad}")
            elif name.endswith("head_mask") and (lost := lost_heads(masks[name], geometry.family)):
                problems.append(f"{name}: {lost}")
    if problems:
        raise InputError(f"{path} does not fit the model:", problems)
    return layer_masks(masks, len(geometry.layers))


def _describe_keys(names: Iterable[str]) -> str:
    """The kinds of keys, with {i} for the layer."""
    kinds = {re.sub(r"\d+", "{i}", name): None for name in names}
    return " and ".join(kinds)
