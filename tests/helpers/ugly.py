"""Model directories as they come about in real life: one table of those that mean something, one of those that do not.

A case makes a directory of the same Llama in two versions, whose final norm is all 1 or all 2.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from helpers.masked import edit_json
from safetensors.torch import load_file, save_file

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM = "model.norm.weight"


class Ugly:
    """The directory that a case spoils, and what it may put there."""

    def __init__(self, directory: Path, versions: dict[str, Path]):
        self.directory, self.versions = directory, versions

    def put(self, version: str, *patterns: str) -> None:
        """Copies files of a version, all of them unless patterns are given."""
        for pattern in patterns or ("*",):
            for file in self.versions[version].glob(pattern):
                shutil.copyfile(file, self.directory / file.name)

    def path(self, name: str) -> Path:
        return self.directory / name

    def move(self, name: str, new_name: str) -> None:
        self.path(name).rename(self.path(new_name))

    def config(self, **changes) -> None:
        edit_json(self.path("config.json"), **changes)

    def rename(self, rename: Callable[[str], str]) -> None:
        """Other tensor names in the single file."""
        tensors = {rename(name): tensor for name, tensor in load_file(self.path(SINGLE)).items()}
        save_file(tensors, self.path(SINGLE), metadata={"format": "pt"})

    def weight_map(self, change: Callable[[dict], object]) -> None:
        content = json.loads(self.path(INDEX).read_text())
        change(content["weight_map"])
        self.path(INDEX).write_text(json.dumps(content))

    def shards(self) -> list[str]:
        return sorted(path.name for path in self.directory.glob("model-*.safetensors"))


def sharded_twice(d: Ugly) -> None:
    d.put("sharded1")
    for shard in d.shards():
        d.move(shard, shard.replace("of-", "of-1"))
    d.put("sharded2")


def saved_in_one_file_after_shards(d: Ugly) -> None:
    """What save_pretrained leaves: it removes the shards, not their index."""
    d.put("sharded1", INDEX)
    d.put("single2")


def linked_as_in_the_hub_cache(d: Ugly) -> None:
    repository = d.directory.parent / "models--owner--name"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    d.put("sharded1")
    for file in list(d.directory.iterdir()):
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    d.directory.rmdir()
    d.directory.symlink_to(snapshot)


def without_prefix(name: str) -> str:
    return name.removeprefix("model.")


def one_tensor_twice(d: Ugly) -> None:
    d.put("sharded1")
    first, last = d.shards()[0], d.shards()[-1]
    save_file(load_file(d.path(last)) | load_file(d.path(first)), d.path(last), metadata={"format": "pt"})


def index_swaps_shards(d: Ugly) -> None:
    d.put("sharded1")
    d.weight_map(lambda names: names.update({NORM: d.shards()[0]}))


def tensor_without_entry(d: Ugly) -> None:
    d.put("sharded1")
    d.weight_map(lambda names: names.pop("model.layers.0.mlp.up_proj.weight"))


def adapter(d: Ugly) -> None:
    d.path("adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x", "r": 1}')
    save_file({"base_model.model.lm_head.lora_A.weight": torch.ones(1, 96)}, d.path("adapter_model.safetensors"))


def also(name: str, content: bytes = b"x") -> Callable[[Ugly], None]:
    """A complete model in one file, and another file."""
    return lambda d: (d.put("single1"), d.path(name).write_bytes(content))


def only(name: str) -> Callable[[Ugly], None]:
    """No weights but a file in another format."""
    return lambda d: (d.put("single1", "[!m]*"), d.path(name).write_bytes(b"x"))


def spoilt(spoil: Callable[[Path], object]) -> Callable[[Ugly], None]:
    """Shards, one of which is spoilt."""
    return lambda d: (d.put("sharded1"), spoil(d.path(d.shards()[1])))


def replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    return lambda path: (path.unlink(), make(path))


def configured(**changes) -> Callable[[Ugly], None]:
    return lambda d: (d.put("single1"), d.config(**changes))


ACCEPTED = {
    "one file": (lambda d: d.put("single1"), 1),
    "shards": (lambda d: d.put("sharded1"), 1),
    "shards of an older save, not in the index": (sharded_twice, 2),
    "one file, saved over shards": (saved_in_one_file_after_shards, 2),
    "one file and its index": (
        lambda d: (
            d.put("sharded1", INDEX),
            d.put("single1"),
            d.weight_map(lambda names: names.update(dict.fromkeys(names, SINGLE))),
        ),
        1,
    ),
    "links into the hub's cache": (linked_as_in_the_hub_cache, 1),
    "no prefix": (lambda d: (d.put("single1"), d.rename(without_prefix)), 1),
    "prefix twice": (lambda d: (d.put("single1"), d.rename(lambda name: f"model.{name}")), 1),
    "tensor that the index does not name": (tensor_without_entry, 1),
    "pickle beside": (also("pytorch_model.bin"), 1),
    "GGUF beside": (also("model.gguf"), 1),
    "state of a training beside": (also("training_args.bin"), 1),
    "Mistral's own file beside": (
        lambda d: (d.put("sharded1"), d.put("single2", SINGLE), d.move(SINGLE, "consolidated.safetensors")),
        1,
    ),
    "adapter's weights beside shards": (
        lambda d: (d.put("sharded1"), adapter(d), d.path("adapter_config.json").unlink()),
        1,
    ),
    "not quantized": (configured(quantization_config=None), 1),
    "nulls": (
        configured(auto_map=None, attention_bias=None, tie_word_embeddings=None, per_layer_config=None, mlp_bias=None),
        1,
    ),
    "other spelling": (configured(architectures=["LLaMAForCausalLM"]), 1),
    "no architectures": (configured(architectures=None), 1),
}

OTHER_FORMATS = (
    *("pytorch_model.bin", "model.pt", "consolidated.00.pth", "pytorch_model.ckpt"),
    *("tf_model.h5", "flax_model.msgpack", "model-q4.gguf"),
)
REFUSED = {
    "one file beside shards": (lambda d: (d.put("sharded1"), d.put("single2")), INDEX),
    "one file beside a part of the shards": (
        lambda d: (d.put("sharded1"), d.put("single2"), d.path(d.shards()[0]).unlink()),
        INDEX,
    ),
    "shards beside one file, without index": (
        lambda d: (d.put("sharded1", "model-*"), d.put("single2")),
        "model-00001-of-",
    ),
    "another file beside": (also("model.fp16.safetensors"), "model.fp16.safetensors"),
    "adapter": (lambda d: (d.put("single1"), adapter(d)), "adapter_config.json"),
    "adapter beside shards": (lambda d: (d.put("sharded1"), adapter(d)), "adapter_config.json"),
    "adapter's weights": (
        lambda d: (d.put("single1"), adapter(d), d.path("adapter_config.json").unlink()),
        "adapter_model.safetensors",
    ),
    "adapter alone": (lambda d: (d.put("single1", "[!m]*"), adapter(d)), "adapter_config.json"),
    "weights under another name": (configured(transformers_weights="other.safetensors"), "transformers_weights"),
    "shards without index": (lambda d: (d.put("sharded1"), d.path(INDEX).unlink()), "model-00001-of-"),
    "nothing": (lambda d: d.put("single1", "[!m]*"), SINGLE),
    **{f"only {name}": (only(name), name) for name in OTHER_FORMATS},
    "a shard is missing": (spoilt(Path.unlink), "model-00002-of-"),
    "a shard is empty": (spoilt(lambda path: path.write_bytes(b"")), "model-00002-of-"),
    "a shard is cut": (spoilt(lambda path: path.write_bytes(path.read_bytes()[:-1])), "model-00002-of-"),
    "a shard is too long": (spoilt(lambda path: path.write_bytes(path.read_bytes() + b"x")), "model-00002-of-"),
    "a shard is a pointer of Git LFS": (
        spoilt(lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")),
        "git lfs pull",
    ),
    "a shard is a broken link": (
        spoilt(replaced(lambda path: path.symlink_to("../blobs/gone"))),
        "is a link to ../blobs/gone",
    ),
    "a shard is a pipe": (spoilt(replaced(os.mkfifo)), "model-00002-of-"),
    "a shard is a directory": (spoilt(replaced(Path.mkdir)), "model-00002-of-"),
    "the file is a broken link": (
        lambda d: (d.put("single1", "[!m]*"), d.path(SINGLE).symlink_to("gone")),
        SINGLE,
    ),
    "the index is a pipe": (lambda d: (d.put("sharded1"), replaced(os.mkfifo)(d.path(INDEX))), INDEX),
    "the index is no JSON": (lambda d: (d.put("sharded1"), d.path(INDEX).write_text("{")), INDEX),
    "the index is empty": (lambda d: (d.put("sharded1"), d.path(INDEX).write_text("{}")), INDEX),
    "the index leaves the directory": (
        lambda d: (d.put("sharded1"), d.weight_map(lambda names: names.update({NORM: "../x.safetensors"}))),
        "../x.safetensors",
    ),
    "the index is wrong": (index_swaps_shards, "the index says it is in model-00001-of-"),
    "a tensor twice": (one_tensor_twice, "keep one"),
    "a tensor under two names": (
        lambda d: (d.put("sharded1"), save_file({"norm.weight": torch.ones(96)}, d.path(d.shards()[0]))),
        NORM,
    ),
    "another kind of model": (
        configured(architectures=["LlamaForSequenceClassification"]),
        "LlamaForSequenceClassification",
    ),
    "more layers than there are": (configured(num_hidden_layers=9999), "9,999 layers, the files have 3"),
    "fewer layers than there are": (configured(num_hidden_layers=2), "2 layers, the files have 3"),
    "a million layers": (configured(num_hidden_layers=10**6), "num_hidden_layers"),
    "a trillion heads": (configured(num_attention_heads=10**12, num_key_value_heads=10**12), "num_attention_heads"),
}
