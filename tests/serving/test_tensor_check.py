"""A directory that does not fit its config.json is refused before vLLM starts a process: a VllmConfig is enough.

Each process that fails later would end with a sentence about that process, below which nobody finds ours.
"""

import json
import shutil

import pytest
import torch
from helpers.masked import RAGGED
from helpers.serving import rewrite
from helpers.tiny import converted, tiny_model
from vllm.engine.arg_utils import EngineArgs

from pruned_vllm.formats.weights import INDEX_FILE


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return converted(tmp_path_factory.mktemp("model"), tiny_model("llama", 6, 6, 40), RAGGED)


def read(directory, **arguments) -> None:
    EngineArgs(str(directory), max_model_len=128, skip_tokenizer_init=True, **arguments).create_engine_config()


def lose_and_cut(directory) -> None:
    def change(tensors):
        del tensors["model.layers.0.mlp.up_proj.weight"]
        name = "model.layers.1.self_attn.o_proj.weight"
        tensors[name] = tensors[name][:, :-1].contiguous()
        tensors["model.layers.3.mlp.up_proj.weight"] = torch.ones(2, 96)

    rewrite(directory, change)


def truncate(directory) -> None:
    (path,) = directory.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-100])


def lose_a_shard(directory) -> None:
    first, second = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    (path,) = directory.glob("*.safetensors")
    path.rename(directory / first)
    weight_map = {"model.norm.weight": first, "lm_head.weight": second}
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))


def keep_a_pickle(directory) -> None:
    (path,) = directory.glob("*.safetensors")
    path.rename(directory / "pytorch_model.bin")
    (directory / INDEX_FILE).unlink(missing_ok=True)


DAMAGES = {
    lose_and_cut: (
        "does not fit its config.json in 3 tensors",
        "model.layers.0.mlp.up_proj.weight [17, 96]: missing",
        "model.layers.1.self_attn.o_proj.weight: the file has [96, 31], config.json says [96, 32]",
        "model.layers.3.mlp.up_proj.weight [2, 96]: not a tensor of this model",
    ),
    truncate: ("model.safetensors", "is truncated"),
    lose_a_shard: ("model-00002-of-00002.safetensors",),
    keep_a_pickle: ("has neither model.safetensors nor model.safetensors.index.json",),
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_named_before_anything_starts(model, tmp_path, damage):
    directory = shutil.copytree(model, tmp_path / "damaged")
    read(directory)
    damage(directory)
    with pytest.raises(ValueError) as error:
        read(directory)
    assert str(directory) in str(error.value)
    for sentence in DAMAGES[damage]:
        assert sentence in str(error.value)


@pytest.mark.parametrize("arguments", [{"load_format": "dummy"}, {"load_format": "sharded_state"}], ids=str)
def test_files_that_vllm_will_not_read_are_not_judged(model, tmp_path, arguments):
    directory = shutil.copytree(model, tmp_path / "damaged")
    lose_and_cut(directory)
    read(directory, **arguments)
