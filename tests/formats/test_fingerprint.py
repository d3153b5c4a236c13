"""A fingerprint changes with the model, and with nothing else."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.fingerprint import Fingerprint

CONFIG = {"model_type": "llama", "hidden_size": 96, "rope_scaling": None, "transformers_version": "5.1"}

LARGE, SMALL = "layers.0.mlp.up_proj.weight", "layers.0.input_layernorm.weight"


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        LARGE: torch.randn(300, 500, generator=generator),  # larger than what is sampled of it
        SMALL: torch.randn(96, generator=generator),
        "c.weight": torch.randn(10, 96, generator=generator),
    }


def write(directory: Path, config: dict = CONFIG, *shards: dict[str, torch.Tensor]) -> Fingerprint:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    if len(shards) < 2:
        save_file(shards[0] if shards else tensors(), directory / "model.safetensors", metadata={"format": "pt"})
        return Fingerprint.from_directory(directory)
    weight_map = {}
    for number, shard in enumerate(shards):
        weight_map |= dict.fromkeys(shard, f"model-{number}.safetensors")
        save_file(shard, directory / f"model-{number}.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return Fingerprint.from_directory(directory)


def changed(name: str, change) -> dict[str, torch.Tensor]:
    return tensors() | {name: change(tensors()[name])}


def with_value(*index: int):
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[index] += 1
        return tensor

    return change


SAME = {
    "copied": [CONFIG],
    "sharded": [CONFIG, {SMALL: tensors()[SMALL]}, {k: x for k, x in tensors().items() if k != SMALL}],
    "other order in the file": [CONFIG, dict(reversed(tensors().items()))],
    "names without model.": [CONFIG, {name.replace("layers", "model.layers"): x for name, x in tensors().items()}],
    "null is absent": [{key: value for key, value in CONFIG.items() if value is not None}],
    "other order in config.json": [dict(reversed(CONFIG.items()))],
    "saved by another Transformers": [CONFIG | {"transformers_version": "5.2", "_name_or_path": "elsewhere"}],
}
VALUES, HEADERS, CONFIGURED = "hold other values", "other names, shapes or dtypes", "config.json says something else"
OTHER = {
    "another value in config.json": ([CONFIG | {"hidden_size": 97}], [CONFIGURED]),
    "another key in config.json": ([CONFIG | {"sliding_window": 8}], [CONFIGURED]),
    "trained further": ([CONFIG, changed(LARGE, lambda x: x + 1e-3)], [VALUES]),
    "first value": ([CONFIG, changed(LARGE, with_value(0, 0))], [VALUES]),
    "last value": ([CONFIG, changed(LARGE, with_value(-1, -1))], [VALUES]),
    "one value of a small tensor": ([CONFIG, changed(SMALL, with_value(50))], [VALUES]),
    "a row that is sampled": ([CONFIG, changed(LARGE, lambda x: x.roll(1, 0))], [VALUES]),
    "another dtype": ([CONFIG, changed("c.weight", lambda x: x.half())], [HEADERS]),
    "another shape": ([CONFIG, changed("c.weight", lambda x: x.T.contiguous())], [HEADERS]),
    "a tensor more": ([CONFIG, tensors() | {"d.weight": torch.ones(3)}], [HEADERS]),
    "a tensor less": ([CONFIG, {LARGE: tensors()[LARGE]}], [HEADERS]),
    "two swapped": ([CONFIG, tensors() | {SMALL: torch.zeros(96), "c.weight": torch.zeros(10, 96)}], [VALUES]),
    "everything": ([CONFIG | {"hidden_size": 9}, {"x": torch.ones(2)}], [CONFIGURED, HEADERS]),
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_model(tmp_path, name):
    fingerprint = write(tmp_path / "model")
    assert write(tmp_path / "other", *SAME[name]) == fingerprint
    assert Fingerprint.parse(str(fingerprint)) == fingerprint and not fingerprint.differences(fingerprint)


@pytest.mark.parametrize("name", OTHER)
def test_another_model(tmp_path, name):
    content, expected = OTHER[name]
    found = write(tmp_path / "model").differences(write(tmp_path / "other", *content))
    assert len(found) == len(expected) and all(part in text for part, text in zip(expected, found, strict=True))


@pytest.mark.parametrize("text", ["", "abc", "config:1 tensors:2 samples:3", 3 * "x:0123456789abcdef "])
def test_what_is_no_fingerprint(text):
    with pytest.raises(ValueError, match="is no fingerprint"):
        Fingerprint.parse(text)


DAMAGE = {
    "empty": lambda content: b"",
    "truncated": lambda content: content[:-1],
    "header only": lambda content: content[:50],
    "no safetensors": lambda content: b"PK\3\4" * 1000,
    "header is a list": lambda content: b"\2" + bytes(7) + b"[]",
    "entries are numbers": lambda content: b"\x08" + bytes(7) + b'{"a": 3}',
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_named(tmp_path, name):
    write(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(DAMAGE[name](path.read_bytes()))
    with pytest.raises(InputError, match=r"model\.safetensors \([\d,]+ bytes\) is truncated or no safetensors file"):
        Fingerprint.from_directory(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    write(tmp_path, *SAME["sharded"])
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-1\.safetensors"):
        Fingerprint.from_directory(tmp_path)


def test_reads_a_part_of_large_tensors(tmp_path):
    """A sparse file of 8 GiB: reading all of it would take seconds."""
    header = json.dumps({"a": {"dtype": "U8", "shape": [1 << 33], "data_offsets": [0, 1 << 33]}}).encode()
    (tmp_path / "config.json").write_text("{}")
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (1 << 33))
    before = json.loads(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])
    Fingerprint.from_directory(tmp_path)
    after = json.loads(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])
    assert after - before < 1 << 20
