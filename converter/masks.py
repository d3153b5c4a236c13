"""Reads the two files that make a model directory a masked checkpoint: pruning_masks.safetensors and pruning.json."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from converter.checkpoint import ELEMENT_BYTES, open_shard
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import is_inside, read_json
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.masked import (
    CHANNEL_MASK,
    CHANNEL_MASK_SITES,
    EXPERT_MASK,
    FORMAT_VERSION,
    HEAD_MASK,
    MASKS_FILE,
    PRUNING_FILE,
    PRUNING_KEYS,
)


@dataclass(frozen=True)
class PruningInfo:
    """pruning.json.

    Attributes:
        method: what learned the masks, e.g. "ddp".
        channel_mask_site: what the channel mask multiplied: "product" act(gate)*up, "gate_and_up" both projections.
        base_model: directory or hub id of the weights, where the checkpoint holds masks only.
        lora_adapter: directory of a PEFT adapter below the checkpoint, or None.
    """

    method: str
    channel_mask_site: str
    base_model: str | None
    lora_adapter: str | None

    @classmethod
    def read(cls, directory: Path) -> "PruningInfo":
        """Raises InputError with every problem in the file."""
        path = directory / PRUNING_FILE
        content = read_json(path)
        problems = [
            f"unknown key {key!r}; known: {', '.join(PRUNING_KEYS)}" for key in sorted(set(content) - set(PRUNING_KEYS))
        ]

        def expect(key: str, good: bool, wanted: str) -> Any:
            if not good:
                problems.append(f"{key} is {content.get(key)!r}; it must be {wanted}")
            return content.get(key)

        expect("format_version", content.get("format_version") == FORMAT_VERSION, f"{FORMAT_VERSION}")
        info = cls(
            method=expect("method", re.fullmatch(r"[\w.+-]+", str(content.get("method"))), "one word"),
            channel_mask_site=expect(
                "channel_mask_site",
                content.get("channel_mask_site") in CHANNEL_MASK_SITES,
                f"one of {CHANNEL_MASK_SITES}",
            ),
            base_model=expect("base_model", isinstance(content.get("base_model"), str | None), "a string or null"),
            # A checkpoint from elsewhere must not make this command merge what is elsewhere.
            lora_adapter=expect(
                "lora_adapter",
                content.get("lora_adapter") is None or is_inside(content["lora_adapter"]),
                "null or a directory inside of the checkpoint, relative to it and without '..'",
            ),
        )
        if problems:
            raise InputError(f"{path}:", problems)
        return info


@dataclass(frozen=True)
class LayerMasks:
    """The masks of one layer in float32; None prunes nothing and scales nothing."""

    head: torch.Tensor | None  # [num_attention_heads]
    channel: torch.Tensor | None  # [intermediate_size]
    expert: torch.Tensor | None = None  # [num_experts, moe_intermediate_size]


def read_masks(directory: Path, geometry: ModelGeometry) -> list[LayerMasks]:
    """Reads and checks the masks for a dense model of this geometry.

    Raises:
        InputError: with every unknown key, wrong shape or dtype, value that is NaN or infinite, and head that the
            family cannot lose.
    """
    path = directory / MASKS_FILE
    shard = open_shard(path)
    expected = _mask_shapes(geometry)
    masks: dict[str, torch.Tensor] = {}
    problems = []
    for name in sorted(shard.keys()):
        header = shard.get_slice(name)
        shape = tuple(header.get_shape())
        if name not in expected:
            problems.append(
                f"{name}: unknown key; known: {_describe_keys(expected)} for layers 0 to {len(geometry.layers) - 1}"
            )
        elif shape != expected[name]:
            problems.append(f"{name}: shape {list(shape)}, the model needs {list(expected[name])}")
        elif header.get_dtype() not in ELEMENT_BYTES:
            problems.append(f"{name}: dtype {header.get_dtype()}; masks are floating point")
        else:
            masks[name] = shard.get_tensor(name).float()
            if bad := int((~masks[name].isfinite()).sum()):
                problems.append(f"{name}: {bad} of {masks[name].numel()} values are NaN or infinite")
            elif name.endswith("head_mask") and not geometry.family.can_lose_heads and (masks[name] == 0).any():
                problems.append(
                    f"{name}: {int((masks[name] == 0).sum())} of {shape[0]} heads have a mask of 0, but "
                    f"{geometry.family.architecture} normalises q and k over all heads together, so the others would "
                    "change without them; prune the experts alone"
                )
    if problems:
        raise InputError(f"{path} does not fit the model:", problems)
    return [
        LayerMasks(*(masks.get(key.format(index)) for key in (HEAD_MASK, CHANNEL_MASK, EXPERT_MASK)))
        for index in range(len(geometry.layers))
    ]


def _mask_shapes(geometry: ModelGeometry) -> dict[str, tuple[int, ...]]:
    """The keys that a mask file for this dense model may have."""
    shapes: dict[str, tuple[int, ...]] = {}
    for index, layer in enumerate(geometry.layers):
        shapes[HEAD_MASK.format(index)] = (layer.num_attention_heads,)
        if layer.expert_intermediate_sizes:
            shapes[EXPERT_MASK.format(index)] = (len(layer.expert_intermediate_sizes), layer.expert_width)
        else:
            shapes[CHANNEL_MASK.format(index)] = (layer.intermediate_size,)
    return shapes


def _describe_keys(names: Iterable[str]) -> str:
    """The kinds of keys, with {i} for the layer."""
    kinds = {re.sub(r"\d+", "{i}", name): None for name in names}
    return " and ".join(kinds)
