"""Reads a Hugging Face model directory lazily: names, shapes and dtypes from the headers, tensors one at a time."""

import json
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pruned_vllm.errors import InputError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

FLOAT_DTYPES = {"F64", "F32", "F16", "BF16"}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises InputError when it is missing, damaged or no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def open_shard(path: Path):
    """A safetensors file, its header checked against its length. Raises InputError."""
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except SafetensorError as error:
        size = path.stat().st_size
        raise InputError(
            f"{path} ({size:,} bytes) is truncated or no safetensors file: {error}; download or save it again"
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
            for name in (name for name, its_file in files.items() if its_file == file):
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
        outside = {
            file
            for file in weight_map.values()
            if not isinstance(file, str) or "\\" in file or PurePosixPath(file).is_absolute() or ".." in file.split("/")
        }
        if outside:
            raise InputError(
                f"{index} names files outside of its directory; nothing was read:", sorted(map(repr, outside))
            )
        return weight_map

    def read(self, name: str) -> torch.Tensor:
        """Loads one tensor."""
        return self._shards[name].get_tensor(name)


def has_weights(directory: Path) -> bool:
    """Whether the directory holds safetensors weights (a masked checkpoint may hold its masks only)."""
    return (directory / INDEX_FILE).exists() or (directory / SINGLE_FILE).exists()
