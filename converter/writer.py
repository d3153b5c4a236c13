"""Writes tensors as safetensors, in one file or in shards with an index, holding one shard in memory."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from pruned_vllm.common.files import write_json
from pruned_vllm.formats.weights import INDEX_FILE, SINGLE_FILE


class ShardWriter:
    """Collects tensors and writes a shard whenever the next one would exceed the limit.

        writer = ShardWriter(directory, max_shard_bytes)
        writer.add(name, tensor)    # as often as needed
        writer.finish()

    Raises:
        OSError: when the disk is full or cannot be written.
    """

    def __init__(self, directory: Path, max_shard_bytes: int):
        self._directory = directory
        self._max_shard_bytes = max_shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._total_bytes = 0
        self._shards: list[list[str]] = []  # names of the tensors in each shard

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if self._pending and self._pending_bytes + tensor.nbytes > self._max_shard_bytes:
            self._flush()
        self._pending[name] = tensor
        self._pending_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes

    def finish(self) -> None:
        """Writes the last shard and gives the shards their final names: one alone needs no index."""
        self._flush()
        count = len(self._shards)
        if count == 1:
            self._part(0).rename(self._directory / SINGLE_FILE)
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self._directory / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        write_json(self._directory / INDEX_FILE, index)

    def _part(self, number: int) -> Path:
        return self._directory / f"model-{number + 1:05d}.part"

    def _flush(self) -> None:
        path = self._part(len(self._shards))
        try:
            save_file(self._pending, path, metadata={"format": "pt"})
        except SafetensorError as error:  # how safetensors reports a failing disk
            raise OSError(f"cannot write {path.name}: {error}") from error
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0
