"""The weights of a model, read lazily: one tensor at a time."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from converter.matrices import LoadedMatrix, Matrix, PackedMatrix, StoredMatrix, StridedMatrix
from converter.pickled_tensors import span_in_file
from converter.reading import HOLE_BYTES, OpenFiles, Piece
from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.config import read_config
from pruned_vllm.formats.dense_tensors import as_converted
from pruned_vllm.formats.headers import ELEMENT_BYTES, StoredTensor, read_headers

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


class Checkpoint:
    """The weights of a model directory, or of files in another format whose tensors an importer took out.

    Attributes:
        directory: where it is.
        config: the content of config.json, less keys that are null.
        tensors: every tensor by its name in `ModelGeometry.tensor_shapes`, from the headers. Both know all biases, and
            fused projections are taken apart.
    """

    def __init__(
        self,
        directory: Path,
        config: Mapping[str, Any],
        tensors: Mapping[str, StoredTensor],
        loaded: Mapping[str, torch.Tensor] | None = None,
        files: OpenFiles | None = None,
    ):
        """A checkpoint of these tensors. Raises InputError where fused ones do not fit config.json.

        Args:
            loaded: tensors by name that are not in a file, or not as they would be read there.
            files: those that are open already.
        """
        self.directory = directory
        self.config, self.tensors = as_converted(config, tensors)
        self._loaded = dict(loaded or {})
        self._files = files or OpenFiles()
        for file in {tensor.file for tensor in self.tensors.values()}:
            self._files.watch(file)

    @classmethod
    def from_directory(cls, directory: Path) -> "Checkpoint":
        """Reads every file's header. Raises InputError with all problems of the index and the files."""
        return cls(directory, read_config(directory), read_headers(directory))

    @classmethod
    def from_tensors(cls, file: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> "Checkpoint":
        """Tensors that were taken out of `file`, by name."""
        return cls(file.parent, config, {}).replaced({file: tensors})

    def replaced(self, files: Mapping[Path, Mapping[str, torch.Tensor]]) -> "Checkpoint":
        """The same with the tensors that were taken out of these files, in place of those of the same names.

        Shards come together: whether a model has biases is told by the tensors of all of them.
        """
        stored, loaded = dict(self.tensors), dict(self._loaded)
        for file, tensors in files.items():
            for name, tensor in tensors.items():
                dtype, span = DTYPES.get(tensor.dtype, str(tensor.dtype)), span_in_file(tensor)
                stored[name] = StoredTensor(file, name, tuple(tensor.shape), dtype, span)
                loaded.pop(name, None)
                if span == (0, 0):
                    loaded[name] = tensor
        return Checkpoint(self.directory, self.config, stored, loaded, self._files)

    def with_copy(self, name: str, original: str) -> "Checkpoint":
        """The same with one more tensor: another one under a second name."""
        tensors = {**self.tensors, name: self.tensors[original]}
        loaded = {**self._loaded, name: self._loaded[original]} if original in self._loaded else self._loaded
        return Checkpoint(self.directory, self.config, tensors, loaded, self._files)

    def without(self, names: Iterable[str]) -> "Checkpoint":
        """The same without these tensors."""
        gone = set(names)
        left = {name: tensor for name, tensor in self.tensors.items() if name not in gone}
        loaded = {name: tensor for name, tensor in self._loaded.items() if name in left}
        return Checkpoint(self.directory, self.config, left, loaded, self._files)

    def renamed(self, names: Mapping[str, str]) -> "Checkpoint":
        """The same with other names, new by old; no two tensors may come to share one."""
        tensors = {names.get(name, name): tensor for name, tensor in self.tensors.items()}
        loaded = {names.get(name, name): tensor for name, tensor in self._loaded.items()}
        return Checkpoint(self.directory, self.config, tensors, loaded, self._files)

    def with_config(self, config: Mapping[str, Any]) -> "Checkpoint":
        """The same with another config.json."""
        return Checkpoint(self.directory, config, self.tensors, self._loaded, self._files)

    def bytes_of(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Bytes of these tensors, of whatever shapes, in the dtypes that they have here, or that of the embedding."""
        embedding = self.tensors["model.embed_tokens.weight"]
        dtypes = {name: self.tensors.get(name, embedding).dtype for name in shapes}
        return sum(ELEMENT_BYTES[dtypes[name]] * math.prod(shape) for name, shape in shapes.items())

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype of a float tensor."""
        return TORCH_DTYPES[self.tensors[name].dtype]

    def read(self, name: str) -> torch.Tensor:
        """Loads one tensor. Raises InputError where its file cannot be read."""
        matrix = self.matrix(name)
        if isinstance(matrix, LoadedMatrix):
            return matrix.tensor.contiguous()  # pickled tensors may be views
        result = torch.empty(self.tensors[name].shape, dtype=matrix.dtype)
        if result.nbytes:
            tensor, memory = self.tensors[name], result.view(-1).view(torch.uint8).numpy()
            if tensor.strides or tensor.packed:
                matrix.read(np.arange(matrix.num_rows), memory, memoryview(bytearray(HOLE_BYTES)))
            else:
                piece = Piece(tensor.span[0], [(0, result.nbytes)])
                self._files.read(tensor.file, [piece], memory.data, memoryview(b""))
        return result

    def matrix(self, name: str) -> Matrix:
        """One tensor, to be read a few rows at a time. Raises InputError for other than float tensors."""
        tensor = self.tensors[name]
        if name in self._loaded:
            return LoadedMatrix(self._loaded[name])
        if tensor.dtype not in TORCH_DTYPES:
            raise InputError(f"{name} in {tensor.file}: dtype {tensor.dtype}; only {sorted(TORCH_DTYPES)} can be read")
        if tensor.is_zeros:
            return LoadedMatrix(torch.zeros(tensor.shape, dtype=TORCH_DTYPES[tensor.dtype]))
        kind = PackedMatrix if tensor.packed else StridedMatrix if tensor.strides else StoredMatrix
        return kind(self._files, tensor, TORCH_DTYPES[tensor.dtype])

    def check_unchanged(self) -> None:
        """Raises InputError where a file was written to, or another took its place, since its tensors are known."""
        self._files.check_unchanged()
