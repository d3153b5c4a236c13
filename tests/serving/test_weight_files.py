"""What vLLM is told of a directory before it reads any weights."""

import shutil

import pytest
from helpers.masked import RAGGED, convert_pruned, edit_json
from helpers.tiny import tiny_model, write_masked
from vllm.engine.arg_utils import EngineArgs


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    write_masked(directory / "ckpt", tiny_model("llama", 6, 6, 40), RAGGED)
    assert convert_pruned(directory / "ckpt", directory / "out", "--max-shard-size", "100KB") == 0
    return directory / "out"


def configure(directory, **options):
    return EngineArgs(str(directory), dtype="float32", skip_tokenizer_init=True, **options).create_engine_config()


def test_a_directory_with_two_sets_of_weights_is_not_served(out, tmp_path):
    shutil.copytree(out, tmp_path / "out")
    shutil.copyfile(out.parent / "ckpt" / "model.safetensors", tmp_path / "out" / "model.safetensors")
    with pytest.raises(Exception, match="has both model.safetensors and model.safetensors.index.json"):
        configure(tmp_path / "out")
    configure(tmp_path / "out", load_format="dummy")


def test_null_is_not_quantized(out, tmp_path):
    shutil.copytree(out, tmp_path / "out")
    edit_json(tmp_path / "out" / "config.json", quantization_config=None)
    assert configure(tmp_path / "out").quant_config is None
