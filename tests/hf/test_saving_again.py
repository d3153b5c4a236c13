"""Saving a pruned model into a directory that holds an earlier save: the next reader finds the new weights alone."""

import json

import pytest
import torch
from helpers.masked import RAGGED, convert_pruned, edit_json
from helpers.tiny import tiny_model, write_masked

from pruned_vllm.formats.weights import find_weight_files
from pruned_vllm.hf.loading import load_pruned

SIZES = {"one file": "5GB", "shards": "100KB", "other shards": "50KB"}


@pytest.fixture
def out(tmp_path):
    write_masked(tmp_path / "ckpt", tiny_model("llama", 6, 6, 40), RAGGED)
    return tmp_path / "out"


@pytest.mark.parametrize("first", SIZES)
@pytest.mark.parametrize("then", SIZES)
def test_only_the_new_weights_are_left(out, first, then):
    assert convert_pruned(out.parent / "ckpt", out, "--max-shard-size", SIZES[first]) == 0
    model = load_pruned(out)
    with torch.no_grad():
        model.model.norm.weight.fill_(7)
    model.save_pretrained(out, max_shard_size=SIZES[then])
    files = find_weight_files(out)
    assert set(files) == set(out.glob("*.safetensors"))  # what vLLM reads where there is no index
    index = out / "model.safetensors.index.json"
    assert index.exists() == (then != "one file") == (len(files) > 1)
    assert not index.exists() or set(json.loads(index.read_text())["weight_map"].values()) == {f.name for f in files}
    assert load_pruned(out).model.norm.weight.unique().tolist() == [7]


def test_a_model_of_one_file_has_no_index(out):
    assert convert_pruned(out.parent / "ckpt", out) == 0
    assert [path.name for path in out.glob("*.safetensors*")] == ["model.safetensors"]


def test_null_is_absent_in_a_converted_config(out):
    assert convert_pruned(out.parent / "ckpt", out) == 0
    tokens = torch.arange(20)[None]
    expected = load_pruned(out)(tokens).logits
    absent = ("quantization_config", "attention_bias", "mlp_bias", "tie_word_embeddings", "auto_map")
    edit_json(out / "config.json", **dict.fromkeys(absent))
    assert torch.equal(load_pruned(out)(tokens).logits, expected)


def test_pickles_are_not_read_on_request(out):
    assert convert_pruned(out.parent / "ckpt", out) == 0
    assert load_pruned(out, use_safetensors=False).config.num_hidden_layers == 3
