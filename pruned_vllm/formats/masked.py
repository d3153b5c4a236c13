"""The masked checkpoint, the format between learn-masks and convert-pruned (README, Formats). Pure Python.

A model directory, or nothing but two files: pruning_masks.safetensors has the masks, pruning.json says how they were
learned and where the weights are. This module knows the masks' keys and shapes, and reads and writes pruning.json.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import is_inside, read_json, write_json
from pruned_vllm.formats.family import Family
from pruned_vllm.formats.fingerprint import Fingerprint
from pruned_vllm.formats.geometry import ModelGeometry

MASKS_FILE = "pruning_masks.safetensors"
HEAD_MASK = "model.layers.{}.self_attn.head_mask"  # [num_attention_heads]; no layers with linear attention
# [intermediate_size]; of the MLP that every token passes, in a layer with experts that of the shared ones
CHANNEL_MASK = "model.layers.{}.mlp.channel_mask"
EXPERT_MASK = "model.layers.{}.mlp.experts.channel_mask"  # [num_experts, moe_intermediate_size], whatever the family
MASK_KEYS = {"head": HEAD_MASK, "channel": CHANNEL_MASK, "expert": EXPERT_MASK}

PRUNING_FILE = "pruning.json"
FORMAT_VERSION = 1
CHANNEL_MASK_SITES = ("product", "gate_and_up")  # the mask multiplied act(gate) * up, or both projections before act

Value = TypeVar("Value")


@dataclass(frozen=True)
class LayerMasks(Generic[Value]):
    """What one layer has for each kind of mask: tensors, arrays or shapes. None prunes nothing and scales nothing."""

    head: Value | None = None  # [num_attention_heads]
    channel: Value | None = None  # [intermediate_size]
    expert: Value | None = None  # [num_experts, moe_intermediate_size]


def layer_masks(masks: Mapping[str, Value], num_layers: int) -> list[LayerMasks[Value]]:
    """The masks of each layer, from a mapping with the keys of pruning_masks.safetensors."""
    return [
        LayerMasks(**{kind: masks.get(key.format(index)) for kind, key in MASK_KEYS.items()})
        for index in range(num_layers)
    ]


def mask_shapes(dense: ModelGeometry) -> dict[str, tuple[int, ...]]:
    """The keys that a mask file for this dense model may have, in the order of the layers, with their shapes."""
    shapes: dict[str, tuple[int, ...]] = {}
    for index, layer in enumerate(dense.layers):
        if not layer.linear_attention:
            shapes[HEAD_MASK.format(index)] = (layer.num_attention_heads,)
        if layer.expert_intermediate_sizes:
            shapes[EXPERT_MASK.format(index)] = (len(layer.expert_intermediate_sizes), layer.expert_width)
        if layer.intermediate_size:
            shapes[CHANNEL_MASK.format(index)] = (layer.intermediate_size,)
    return shapes


def site_problems(family: Family, channel_mask_site: str) -> list[str]:
    """A sentence where masks at this site cannot be folded into the weights of a family's experts."""
    if channel_mask_site != "gate_and_up" or family.experts is None or family.experts.is_linear_in_up:
        return []
    return [
        f"channel_mask_site is gate_and_up, but {family.architecture} clamps both projections and computes (up + 1) * "
        "gate * sigmoid(alpha * gate) of them, so a factor of both is no factor of any weight; learn masks of the "
        'product ("channel_mask_site": "product")'
    ]


@dataclass(frozen=True)
class PruningInfo:
    """pruning.json.

    Attributes:
        method: what learned the masks, e.g. "ddp".
        channel_mask_site: what the channel mask multiplied: "product" act(gate)*up, "gate_and_up" both projections.
        base_model: directory or hub id of the weights, where the checkpoint holds masks only.
        lora_adapter: directory of a PEFT adapter below the checkpoint, or None.
        base_revision: commit of the hub repository `base_model` that the masks were learned on; None where it is
            a directory or not known.
        base_fingerprint: `Fingerprint` of the model that the masks belong to, as text; None where it is not known.
    """

    method: str
    channel_mask_site: str
    base_model: str | None = None
    lora_adapter: str | None = None
    base_revision: str | None = None
    base_fingerprint: str | None = None

    @classmethod
    def read(cls, directory: Path) -> "PruningInfo":
        """Raises InputError with every problem in the file."""
        path = directory / PRUNING_FILE
        content = read_json(path)
        known = ("format_version", *cls.__dataclass_fields__)
        problems = [f"unknown key {key!r}; known: {', '.join(known)}" for key in sorted(set(content) - set(known))]

        def expect(key: str, good: bool, wanted: str) -> None:
            if not good:
                problems.append(f"{key} is {content.get(key)!r}; it must be {wanted}")

        site, adapter = content.get("channel_mask_site"), content.get("lora_adapter")
        expect("format_version", content.get("format_version") == FORMAT_VERSION, f"{FORMAT_VERSION}")
        expect("method", re.fullmatch(r"[\w.+-]+", str(content.get("method"))) is not None, "one word")
        expect("channel_mask_site", site in CHANNEL_MASK_SITES, f"one of {CHANNEL_MASK_SITES}")
        for key in ("base_model", "base_revision"):
            expect(key, isinstance(content.get(key), str | None), "a string or null")
        fingerprint = content.get("base_fingerprint")
        expect("base_fingerprint", fingerprint is None or Fingerprint.is_one(fingerprint), "what learn-masks wrote")
        # A checkpoint from elsewhere must not make convert-pruned merge what is elsewhere.
        inside = "null or a directory inside of the checkpoint, relative to it and without '..'"
        expect("lora_adapter", adapter is None or is_inside(adapter), inside)
        if problems:
            raise InputError(f"{path}:", problems)
        return cls(**{key: content.get(key) for key in cls.__dataclass_fields__})

    def write(self, directory: Path) -> None:
        """Writes pruning.json; `base_revision` and `base_fingerprint` only where they are known."""
        optional = ("base_revision", "base_fingerprint")
        content: dict[str, Any] = {"format_version": FORMAT_VERSION, **asdict(self)}
        kept = {key: value for key, value in content.items() if value is not None or key not in optional}
        write_json(directory / PRUNING_FILE, kept)
