"""Reads a Hugging Face model directory lazily: names, shapes and dtypes from the headers, tensors one at a time."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import is_inside, read_json

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

ELEMENT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # the dtypes that masks can be folded into


def open_shard(path: Path):
    """A safetensors file, its header checked against its length. Raises InputError."""
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        if not path.is_file():
            raise InputError(f"{path} is missing") from None
        if not os.access(path, os.R_OK):
            raise InputError(f"{path} cannot be read: permission denied") from None
        raise InputError(
            f"{path} ({path.stat().st_size:,} bytes) is truncated or no safetensors file: {error}; "
            "download or save it again"
        ) from None


class Checkpoint:
    """The weights of a model directory.

    Attributes:
        directory: where it is.
        config: the content of config.json.
        shapes: tensor name -> shape, from the headers.
        dtypes: tensor name -> safetensors dtype ("BF16").
    """

    def __init__(self, directory: Path):
        """Opens every shard's header. Raises InputError with all problems of the index and the shards."""
        self.directory = directory
        self.config = read_json(directory / "config.json")
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._shards: dict[str, Any] = {}
        problems: list[str] = []
        files = self._files()
        for file in sorted(set(files.values())):
            try:
                shard = open_shard(directory / file)
            except InputError as error:
                problems.append(str(error))
                continue
            present = set(shard.keys())
            for name in (name for name, shard_file in files.items() if shard_file == file):
                if name not in present:
                    problems.append(f"{name}: the index says it is in {file}, but it is not")
                    continue
                header = shard.get_slice(name)
                self.shapes[name] = tuple(header.get_shape())
                self.dtypes[name] = header.get_dtype()
                self._shards[name] = shard
        if problems:
            raise InputError(f"The weights in {directory} cannot be read:", problems)

    def _files(self) -> dict[str, str]:
        """Tensor name -> file name relative to the directory."""
        index = self.directory / INDEX_FILE
        if not index.exists():
            single = self.directory / SINGLE_FILE
            if not single.exists():
                pickled = any(self.directory.glob("*.bin")) or any(self.directory.glob("*.pt"))
                fix = "; pickled weights are never read: save the model with save_pretrained first" if pickled else ""
                raise InputError(f"{self.directory} has neither {SINGLE_FILE} nor {INDEX_FILE}{fix}")
            return dict.fromkeys(open_shard(single).keys(), SINGLE_FILE)
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{index} has no weight_map")
        outside = {repr(file) for file in weight_map.values() if not is_inside(file)}
        if outside:
            raise InputError(f"{index} names files outside of its directory; nothing was read:", sorted(outside))
        return weight_map

    def add_zeros(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Adds biases that are zeros, in the dtype of their weight."""
        for name, shape in shapes.items():
            self.shapes[name], self.dtypes[name] = shape, self.dtypes[_weight_of(name)]

    def bytes_of(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Bytes of these tensors, of whatever shapes, in the dtypes that they have here."""
        return sum(ELEMENT_BYTES[self.dtypes[name]] * math.prod(shape) for name, shape in shapes.items())

    def read(self, name: str) -> torch.Tensor:
        """Loads one tensor."""
        if name not in self._shards:  # one of `add_zeros`
            weight = _weight_of(name)
            return self._shards[weight].get_slice(weight)[:0].new_zeros(self.shapes[name])
        return self._shards[name].get_tensor(name)


def _weight_of(bias: str) -> str:
    return f"{bias.removesuffix('.bias')}.weight"


def has_weights(directory: Path) -> bool:
    """Whether the directory holds safetensors weights (a masked checkpoint may hold its masks only)."""
    return (directory / INDEX_FILE).exists() or (directory / SINGLE_FILE).exists()
