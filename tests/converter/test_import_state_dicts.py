"""Cut tensors in files of torch.save: pytorch_model.bin, shards with an index, state dicts that lie beside or alone."""

import json
import os

import pytest
import torch
from helpers.cut import check_same_logits, cut_weights, zeroed
from helpers.imports import assert_converts, logits, stored, write_flap
from helpers.masked import convert_pruned, edit_json
from helpers.tiny import byte_tokenizer, tiny_model
from safetensors.torch import save_file

from converter.importers import recognised
from pruned_vllm.hf.loading import load_pruned

KEPT_HEADS, CHANNELS = [[0, 2], [1], [0, 1, 2]], [[3, 7], list(range(40)), [39]]


def write_index(directory, **files: dict) -> None:
    weight_map = {}
    for file, tensors in files.items():
        torch.save(tensors, directory / f"{file}.bin")
        weight_map |= dict.fromkeys(tensors, f"{file}.bin")
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def halves(weights: dict) -> dict[str, dict]:
    names = list(weights)
    middle = len(names) // 2
    return {
        "a": {name: weights[name] for name in names[:middle]},
        "b": {name: weights[name] for name in names[middle:]},
    }


def written(file: str, change=lambda weights: weights, **options):
    def write(directory, weights):
        torch.save(change(weights), directory / file, **options)
        return directory / file if file != "pytorch_model.bin" else directory

    return write


def sharded(directory, weights):
    write_index(directory, **halves(weights))
    return directory


def turned(weights: dict) -> dict:
    """The same numbers, others beside each other in memory."""
    return {name: tensor.T.contiguous().T if tensor.dim() == 2 else tensor for name, tensor in weights.items()}


FORMS = {
    "pytorch_model.bin": written("pytorch_model.bin"),
    "legacy": written("pytorch_model.bin", _use_new_zipfile_serialization=False),
    "shards": sharded,
    "a file": written("model.pt"),
    "state_dict of training": written("epoch_1.pth", lambda weights: {"state_dict": weights, "epoch": 3}),
    "names of data parallelism": written("a.pt", lambda weights: {f"module.{name}": w for name, w in weights.items()}),
    "parameters, turned": written("a.pt", lambda w: {k: torch.nn.Parameter(v) for k, v in turned(w).items()}),
}


@pytest.fixture
def directory(tmp_path):
    """Weights of a cut model, and its directory with config.json; the dense model that computes the same."""
    model = tiny_model("llama", 6, 3, 40)
    model.save_pretrained(tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").unlink()
    byte_tokenizer().save_pretrained(tmp_path / "cut")
    return tmp_path / "cut", cut_weights(model, KEPT_HEADS, CHANNELS), zeroed(model, KEPT_HEADS, CHANNELS)


@pytest.mark.parametrize("write", FORMS.values(), ids=FORMS)
def test_state_dicts_are_read_like_safetensors(tmp_path, directory, capsys, write):
    path, weights, expected = directory
    given = write(path, weights)
    assert convert_pruned(given, tmp_path / "out") == 0
    assert "The weights are pickled: " in capsys.readouterr().out
    check_same_logits(load_pruned(tmp_path / "out", dtype=torch.float32), expected)
    assert (tmp_path / "out" / "tokenizer.json").exists()
    if given == path:
        assert list(recognised(path)) == ["shapes"]


def test_biases_count_in_whichever_shard_they_are(tmp_path):
    """FLAP's layers have biases of two projections alone, and config.json knows of none."""
    model = write_flap(tmp_path / "in", ("llama", 6, 6, [[0, 2], [1], [3, 4, 5]], [40, 3, 7]))
    weights = stored(tmp_path / "in")
    (tmp_path / "in" / "model.safetensors").unlink()
    write_index(tmp_path / "in", **halves(weights))
    assert_converts(tmp_path / "in", tmp_path / "out", logits(model))


def test_a_file_alone_needs_a_base_model(tmp_path, directory, capsys):
    path, weights, expected = directory
    (tmp_path / "alone").mkdir()
    torch.save(weights, tmp_path / "alone" / "a.pt")
    assert list(recognised(tmp_path / "alone" / "a.pt")) == ["shapes"]
    assert convert_pruned(tmp_path / "alone" / "a.pt", tmp_path / "out") == 2
    assert "weights, but no config.json is beside them; give the dense model" in capsys.readouterr().err
    assert convert_pruned(tmp_path / "alone" / "a.pt", tmp_path / "out", "--base-model", path) == 0
    check_same_logits(load_pruned(tmp_path / "out", dtype=torch.float32), expected)
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_tied_embeddings_are_stored_twice(tmp_path):
    model = tiny_model("llama", 6, 3, 40, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").unlink()
    torch.save(cut_weights(model, KEPT_HEADS, CHANNELS), tmp_path / "cut" / "pytorch_model.bin")
    assert "lm_head.weight" in torch.load(tmp_path / "cut" / "pytorch_model.bin")
    assert convert_pruned(tmp_path / "cut", tmp_path / "out") == 0
    check_same_logits(load_pruned(tmp_path / "out", dtype=torch.float32), zeroed(model, KEPT_HEADS, CHANNELS))


def add(change):
    def spoil(path, weights):
        changed = change(weights)
        torch.save(weights if changed is None else changed, path / "pytorch_model.bin")

    return spoil


def tie(path, weights):
    torch.save(weights, path / "pytorch_model.bin")
    edit_json(path / "config.json", tie_word_embeddings=True)


def twice(path, weights):
    first, second = halves(weights).values()
    write_index(path, a=first, b=second | {"model.embed_tokens.weight": weights["model.embed_tokens.weight"]})


def both(path, weights):
    torch.save(weights, path / "pytorch_model.bin")
    save_file(weights, path / "model.safetensors")


def with_adapter(path, weights):
    torch.save(weights, path / "pytorch_model.bin")
    (path / "adapter_config.json").write_text("{}")


def two_pickled(path, weights):
    sharded(path, weights)
    torch.save(weights, path / "pytorch_model.bin")


def without_shard(path, weights):
    sharded(path, weights)
    (path / "b.bin").unlink()


def outside(path, weights):
    torch.save(weights, path.parent / "a.bin")
    write_index(path)
    edit_json(path / "pytorch_model.bin.index.json", weight_map={"lm_head.weight": "../a.bin"})


class Model(torch.nn.Module):
    """Not a model of Transformers."""


class Runs:
    def __reduce__(self):
        return os._exit, (3,)


REFUSED = {
    "safetensors too": (both, "holds model.safetensors as well as pytorch_model.bin"),
    "both forms": (two_pickled, "holds both pytorch_model.bin and pytorch_model.bin.index.json"),
    "nothing": (lambda path, weights: None, "holds neither safetensors nor pytorch_model.bin nor"),
    "twice": (twice, "in more than one file; keep one of each:\n  - model.embed_tokens.weight"),
    "shard missing": (without_shard, "b.bin is missing"),
    "outside": (outside, "names files outside of its directory"),
    "no map": (lambda path, weights: write_index(path), "has no weight_map"),
    "a module": (add(lambda weights: Model()), "_state_dicts.Model'; --from llm-pruner"),
    "a program": (add(lambda weights: Runs()), "no state dict, which is tensors by their names, but an object of"),
    "a program among tensors": (add(lambda weights: weights | {"a": Runs()}), "but a dictionary with 'model.embed"),
    "a list": (add(lambda weights: list(weights.values())), "but a list"),
    "tied": (tie, "lm_head.weight differs from model.embed_tokens.weight"),
    "two names": (
        add(lambda weights: weights | {"norm.weight": weights["model.norm.weight"]}),
        "with and without 'model.' before their names",
    ),
    "no name": (add(lambda weights: weights | {"a\x1b[31m": torch.ones(1)}), "names are none of a model: 'a\\x1b[31m'"),
    "an adapter alone": (
        add(lambda _: {f"base_model.model.lm_head.lora_{half}.weight": torch.ones(1) for half in "AB"}),
        "holds a LoRA adapter and no weights",
    ),
    "an adapter too": (with_adapter, "adapter_config.json: Transformers would add this adapter"),
    "no heads": (add(lambda w: w | {"model.layers.0.self_attn.k_proj.weight": torch.ones(1, 96)}), "do not belong"),
    "missing": (
        add(lambda weights: {k: v for k, v in weights.items() if k != "model.norm.weight"}),
        "model.norm.weight [96]: missing",
    ),
    "integers": (add(lambda w: w | {"model.norm.weight": torch.ones(96, dtype=torch.int8)}), "only ['BF16', 'F16'"),
}


@pytest.mark.parametrize(("spoil", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(tmp_path, directory, capsys, spoil, message):
    path, weights, _ = directory
    spoil(path, weights)
    assert convert_pruned(path, tmp_path / "out", "--from", "shapes") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
