"""What cannot be expressed is refused by its name, and nothing that can be converted is."""

import json
import os

import pytest
import torch
from helpers.imports import stored
from helpers.masked import convert_pruned, edit_json, edit_weights
from helpers.tiny import tiny_model

from converter.importers import importer_names, recognised


def model(directory, **config):
    tiny_model("llama", 6, 6, 40).save_pretrained(directory)
    edit_json(directory / "config.json", **config)


def files(**contents):
    """A directory with nothing but these files."""

    def write(directory):
        directory.mkdir()
        for name, content in contents.items():
            path = directory / name.replace("__", ".")
            path.write_bytes(content) if isinstance(content, bytes) else path.write_text(json.dumps(content))

    return write


def slicegpt(directory):
    dimensions = {"hidden_size": 96, "attention_input_dimensions": {"0": 80}}
    files(llama_0__25__json=dimensions, llama_0__25__pt=b"x")(directory)


def slicegpt_state(directory):
    directory.mkdir()
    torch.save({"model.layers.0.attn_shortcut_Q": torch.ones(4, 4)}, directory / "sliced.pt")


def renamed(suffix):
    def write(directory):
        model(directory)
        name = "model.layers.0.self_attn.q_proj.weight"
        tensors = stored(directory)
        edit_weights(directory, {name.replace("self_attn.q_proj.weight", suffix): tensors[name]}, (name,))

    return write


def beside_a_model(name):
    return lambda directory: (model(directory), (directory / name).write_bytes(b"x"))


REFUSED = {
    "SliceGPT": (slicegpt, "SliceGPT", "slicing dimensions in llama_0.25.json"),
    "SliceGPT, a state alone": (slicegpt_state, "SliceGPT", "attn_shortcut_Q"),
    "SliceGPT, safetensors": (renamed("mlp_shortcut_Q"), "SliceGPT", "model.layers.0.mlp_shortcut_Q"),
    "ModelOpt": (beside_a_model("modelopt_state.pth"), "NVIDIA ModelOpt", "move modelopt_state.pth away"),
    "CoFi": (files(zs__pt=b"x", config__json={"model_type": "bert"}), "CoFiPruning", "zs.pt beside a bert model"),
    "CarveLM, components": (
        lambda d: model(d, attention_layer_to_prune=[1], mlp_layer_to_prune=[]), "CarveLM", "hand it on",
    ),
    "CarveLM, manifest": (
        files(model_state__pt=b"x", llm_pruner_manifest__json={"version": 2}), "CarveLM", "save_pretrained",
    ),
    "Baichuan": (files(config__json={"model_type": "baichuan"}), "W_pack", "model_type 'baichuan'"),
    "BLOOM": (files(config__json={"model_type": "bloom"}), "query_key_value", "model_type 'bloom'"),
    "GGUF": (files(model__gguf=b"GGUF"), "llama.cpp (GGUF)", "Hugging Face directory"),
    "GPTQ": (renamed("self_attn.q_proj.qweight"), "a quantizer", "is quantized"),
    "converted": (
        lambda d: model(d, architectures=["PrunedLlamaForCausalLM"], per_layer_config={"0": {"skip": ["mlp"]}}),
        "convert-pruned itself", "vllm serve",
    ),
}  # fmt: skip


@pytest.mark.parametrize("importer", ["auto", "shapes"])
@pytest.mark.parametrize(("write", "name", "message"), REFUSED.values(), ids=REFUSED)
def test_it_is_refused_by_its_name(tmp_path, capsys, write, name, message, importer):
    write(tmp_path / "in")
    assert convert_pruned(tmp_path / "in", tmp_path / "out", "--from", importer) == 2
    error = capsys.readouterr().err
    assert name in error and "and cannot be converted" in error
    assert message in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("write", "file"), [(slicegpt_state, "sliced.pt"), (REFUSED["GGUF"][0], "model.gguf")])
def test_files_are_told_as_their_directories_are(tmp_path, capsys, write, file):
    write(tmp_path / "in")
    assert convert_pruned(tmp_path / "in" / file, tmp_path / "out") == 2
    assert "cannot be converted" in capsys.readouterr().err


def test_quantized_models_and_other_families_are_named(tmp_path, capsys):
    model(tmp_path / "in", quantization_config={"quant_method": "fp8"})
    assert convert_pruned(tmp_path / "in", tmp_path / "out") == 2
    assert "is quantized" in capsys.readouterr().err
    model(tmp_path / "other", model_type="gpt_neox", architectures=["GPTNeoXForCausalLM"])
    assert convert_pruned(tmp_path / "other", tmp_path / "out") == 2
    assert "'gpt_neox' is not supported" in capsys.readouterr().err


# What a model directory is taken for.
RECOGNISED = {
    "dense": (lambda d: None, "zeros"),
    "lists of CarveLM, empty": (
        lambda d: edit_json(d / "config.json", attention_layer_to_prune=[], mlp_layer_to_prune=[]), "zeros",
    ),
    "GGUF beside": (lambda d: (d / "model.gguf").write_bytes(b"GGUF"), "zeros"),
    "a width in config.json": (lambda d: edit_json(d / "config.json", intermediate_size=24), "shapes"),
    "a tensor that is cut": (
        lambda d: edit_weights(d, {"model.layers.0.mlp.up_proj.weight": torch.ones(3, 96)}), "shapes",
    ),
    "a layer that is absent": (lambda d: edit_json(d / "config.json", num_hidden_layers=4), "shapes"),
    "lists of sizes": (lambda d: edit_json(d / "config.json", layer_num=3), "shapes"),
    "block_configs": (lambda d: edit_json(d / "config.json", block_configs=[{}]), "puzzletron"),
    "per_layer_config": (
        lambda d: edit_json(d / "config.json", per_layer_config={"0": {"skip": ["mlp"]}}), "puzzletron",
    ),
    "a list of sublayers": (lambda d: (d / "layer_drop_config.txt").write_text("none\n"), "depth"),
    "masks": (lambda d: (d / "pruning.json").write_text("{}"), "masked"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "name"), RECOGNISED.values(), ids=RECOGNISED)
def test_a_model_directory_is_one_thing(tmp_path, change, name):
    model(tmp_path / "in")
    change(tmp_path / "in")
    assert list(recognised(tmp_path / "in")) == [name] and name in importer_names()


def test_a_pipe_beside_a_model_is_not_waited_for(tmp_path):
    model(tmp_path / "in")
    os.mkfifo(tmp_path / "in" / "a.pt")
    assert convert_pruned(tmp_path / "in", tmp_path / "out") == 0


# What is asked for, of a model directory or of a file in it, and the answer.
WRONG = {
    "zeros, a file": ("zeros", "model.safetensors", "is no directory; give the model directory"),
    "shapes, a file": ("shapes", "config.json", "is no directory; give the model directory"),
    "puzzletron, a file": ("puzzletron", "config.json", "is no directory; give the model directory"),
    "puzzletron": ("puzzletron", "", "neither block_configs nor per_layer_config"),
    "depth": ("depth", "", "has no layer_drop_config.txt"),
    "depth, a file": ("depth", "config.json", "a line for each layer must be one of"),
    "tyr": ("tyr", "", "holds no list of levels"),
    "tyr, a file": ("tyr", "config.json", "is no list of levels"),
    "a file alone": ("auto", "model.safetensors", "is a file in none of the formats"),
}


@pytest.mark.parametrize(("importer", "file", "message"), WRONG.values(), ids=WRONG)
def test_another_format_than_it_is(tmp_path, capsys, importer, file, message):
    model(tmp_path / "in")
    assert convert_pruned(tmp_path / "in" / file, tmp_path / "out", "--from", importer) == 2
    assert message in capsys.readouterr().err
