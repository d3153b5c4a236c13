"""The weights of a Hugging Face model directory, read lazily: one tensor at a time."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pruned_vllm.formats.biases import complete_biases
from pruned_vllm.formats.config import read_config
from pruned_vllm.formats.headers import ELEMENT_BYTES, read_headers
from pruned_vllm.formats.weights import open_safetensors


class Checkpoint:
    """The weights of a model directory.

    Attributes:
        directory: where it is.
        config: the content of config.json, less keys that are null.
        tensors: every tensor by its name in `ModelGeometry.tensor_shapes`, from the headers. Both know all biases.
    """

    def __init__(self, directory: Path):
        """Reads every file's header. Raises InputError with all problems of the index and the files."""
        self.directory = directory
        self.config, self.tensors = complete_biases(read_config(directory), read_headers(directory))
        files = {tensor.file for tensor in self.tensors.values()}
        self._shards: dict[Path, Any] = {file: open_safetensors(file, "pt") for file in files}

    def bytes_of(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Bytes of these tensors, of whatever shapes, in the dtypes that they have here."""
        return sum(ELEMENT_BYTES[self.tensors[name].dtype] * math.prod(shape) for name, shape in shapes.items())

    def read(self, name: str) -> torch.Tensor:
        """Loads one tensor."""
        tensor = self.tensors[name]
        shard = self._shards[tensor.file]
        if tensor.is_zeros:
            return shard.get_slice(tensor.key)[:0].new_zeros(tensor.shape)
        return shard.get_tensor(tensor.key)
