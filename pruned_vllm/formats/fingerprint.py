"""Fingerprint of a model's weights: whether two directories hold the same model, told without reading all of it.

    fingerprint = Fingerprint.from_directory(directory)
    str(fingerprint)                          # "config:5d0a… tensors:91c2… samples:07be…", as pruning.json keeps it
    Fingerprint.parse(text).differences(fingerprint)     # [] or what differs

Three parts, so that a mismatch can say what differs:

- config: config.json without the keys that say nothing of the model
- tensors: name, dtype and shape of every tensor, from the headers
- samples: some bytes of every tensor. A model that was trained further, merged, or converted differs there. A change of
  a few single values may go unnoticed.

How tensors are spread over files does not count. About 16 KiB of each tensor are read, so 100 GB take seconds.
Pure Python.
"""

import hashlib
import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pruned_vllm.common.files import read_json, sample
from pruned_vllm.formats.headers import StoredTensor, checked_tensors
from pruned_vllm.formats.tensors import canonical_name
from pruned_vllm.formats.weights import find_weight_files

UNRELATED_KEYS = ("_name_or_path", "_commit_hash", "transformers_version")  # of config.json: who wrote it
PIECES = 4  # of 4096 bytes, sampled of a tensor; smaller tensors are read whole
DIGITS = 16  # hexadecimal digits of a part


@dataclass(frozen=True)
class Fingerprint:
    """Digests of a model's directory, each DIGITS hexadecimal digits; see the top of this file."""

    config: str
    tensors: str
    samples: str

    @classmethod
    def from_directory(cls, directory: Path) -> "Fingerprint":
        """The fingerprint of a model directory.

        Raises:
            InputError: config.json or the weights cannot be read.
        """
        tensors: dict[str, StoredTensor] = {}
        for path in find_weight_files(directory):
            tensors |= {canonical_name(key): tensor for key, tensor in checked_tensors(path).items()}
        config = read_json(directory / "config.json")
        related = {key: value for key, value in config.items() if value is not None and key not in UNRELATED_KEYS}
        samples = {}
        for path in sorted({tensor.file for tensor in tensors.values()}):
            names = [name for name, tensor in tensors.items() if tensor.file == path]
            with path.open("rb", buffering=0) as file:
                for name in sorted(names, key=lambda name: tensors[name].span):  # as they lie on the disk
                    samples[name] = hashlib.sha256(sample(file.fileno(), *tensors[name].span, PIECES)).digest()
        described = [[name, tensors[name].dtype, tensors[name].shape] for name in sorted(tensors)]
        return cls(
            config=_digest(json.dumps(related, sort_keys=True).encode()),
            tensors=_digest(json.dumps(described).encode()),
            samples=_digest(b"".join(samples[name] for name in sorted(samples))),
        )

    @classmethod
    def parse(cls, text: str) -> "Fingerprint":
        """What `str` wrote. Raises ValueError for other text."""
        pattern = " ".join(f"{field.name}:([0-9a-f]{{{DIGITS}}})" for field in fields(cls))
        if not (match := re.fullmatch(pattern, text)):
            form = " ".join(f"{field.name}:{'x' * DIGITS}" for field in fields(cls))
            raise ValueError(f"{text!r} is no fingerprint; one looks like {form!r}")
        return cls(*match.groups())

    @classmethod
    def is_one(cls, text: Any) -> bool:
        """Whether `text` is what `str` wrote."""
        try:
            return bool(cls.parse(text))
        except (TypeError, ValueError):
            return False

    def __str__(self) -> str:
        return " ".join(f"{field.name}:{getattr(self, field.name)}" for field in fields(self))

    def differences(self, other: "Fingerprint") -> list[str]:
        """What differs in `other`, in words; empty if nothing does."""
        found = []
        if self.config != other.config:
            found.append("config.json says something else")
        if self.tensors != other.tensors:
            found.append("the tensors have other names, shapes or dtypes")
        elif self.samples != other.samples:
            found.append("the tensors hold other values, though their names, shapes and dtypes are the same")
        return found


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:DIGITS]
