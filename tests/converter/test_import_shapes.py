"""Tensors that were cut already, under a config.json that says something else."""

import json

import pytest
import torch
from helpers.dropped import keep_experts
from helpers.imports import assert_converts, cut, logits, replace_weights, sizes, stored, write_flap
from helpers.masked import convert_pruned, edit_json, edit_weights
from helpers.tiny import HEAD_DIM, tiny_model

ALL6, ALL3 = list(range(6)), list(range(3))
# model type, heads, KV heads; KV heads and channels that each layer keeps
GEOMETRIES = {
    "ragged": ("llama", 6, 6, [[0, 3, 5], [1], ALL6], [17, 40, 1]),
    "a layer without heads": ("llama", 6, 6, [[0, 2], [], [4]], [40, 3, 7]),
    "a layer without channels": ("llama", 6, 6, [ALL6, [2], [1, 5]], [5, 0, 40]),
    "a layer without anything": ("mistral", 6, 6, [[0, 1], [], [3]], [9, 0, 11]),
    "GQA": ("llama", 6, 3, [[2], [0, 1], ALL3], [39, 2, 8]),
    "GQA, biases of q, k and v": ("qwen2", 6, 3, [[0, 2], [], ALL3], [1, 2, 0]),
    "GQA, norms of q and k": ("qwen3", 6, 3, [[1], [], ALL3], [3, 40, 0]),
    "uniform": ("llama", 6, 6, [[0, 3]] * 3, [8] * 3),
}


def cut_directory(directory, geometry, keep_empty=False, **config):
    """A saved model whose tensors are cut; the model in which the same is zero."""
    model_type, heads, kv_heads, kept, channels = geometry
    model = tiny_model(model_type, heads, kv_heads, 40, num_hidden_layers=len(kept), **config)
    model.save_pretrained(directory)
    replace_weights(directory, cut(model, kept, channels), keep_empty)
    return model


def expected_sizes(geometry):
    _, heads, kv_heads, kept, channels = geometry
    return [(len(k) * heads // kv_heads, len(k), c) for k, c in zip(kept, channels, strict=True)]


@pytest.mark.parametrize("keep_empty", [False, True], ids=["absent", "without rows"])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_sizes_are_those_of_the_tensors(tmp_path, geometry, keep_empty):
    model = cut_directory(tmp_path / "in", geometry, keep_empty)
    pruned = assert_converts(tmp_path / "in", tmp_path / "out", logits(model))
    assert sizes(pruned) == expected_sizes(geometry)


@pytest.mark.parametrize("keep_empty", [False, True], ids=["absent", "without rows"])
def test_biases_of_layers_that_lost_all_else_stay(tmp_path, keep_empty):
    geometry = ("llama", 6, 6, [[0, 2], [], [4]], [40, 3, 0])
    model = write_flap(tmp_path / "in", geometry, keep_empty=keep_empty)
    pruned = assert_converts(tmp_path / "in", tmp_path / "out", logits(model))
    assert sizes(pruned) == expected_sizes(geometry)
    assert pruned.model.layers[1].self_attn.o_proj.bias.any() and pruned.model.layers[2].mlp.down_proj.bias.any()


def test_a_sublayer_that_is_gone_with_its_bias_adds_nothing(tmp_path):
    model = write_flap(tmp_path / "in", ("llama", 6, 6, [[0, 2], [], [4]], [40, 3, 0]), biased=[0])
    assert_converts(tmp_path / "in", tmp_path / "out", logits(model))


@pytest.mark.parametrize("model_type", ["mistral", "qwen2"])
def test_biases_that_a_family_has_no_key_for_are_refused(tmp_path, capsys, model_type):
    cut_directory(tmp_path / "in", (model_type, 6, 6, [[0, 2], [1], [4]], [40, 3, 2]))
    edit_weights(tmp_path / "in", {"model.layers.0.self_attn.o_proj.bias": torch.ones(96)})
    assert convert_pruned(tmp_path / "in", tmp_path / "out") == 2
    assert "neither Transformers nor vLLM would read it" in capsys.readouterr().err


def test_one_width_in_config_json_and_others_in_the_tensors(tmp_path):
    geometry = ("llama", 6, 6, [ALL6] * 3, [17, 40, 1])
    model = cut_directory(tmp_path / "in", geometry)
    edit_json(tmp_path / "in" / "config.json", intermediate_size=24)  # less than a layer has, as that of another layer
    pruned = assert_converts(tmp_path / "in", tmp_path / "out", logits(model))
    assert sizes(pruned) == expected_sizes(geometry) and pruned.config.intermediate_size == 40


def test_config_json_of_the_smallest_layer(tmp_path):
    geometry = ("mistral", 6, 3, [[0], ALL3, [0, 1]], [17, 40, 1])
    model = cut_directory(tmp_path / "in", geometry)
    edit_json(tmp_path / "in" / "config.json", num_attention_heads=2, num_key_value_heads=1, intermediate_size=1)
    pruned = assert_converts(tmp_path / "in", tmp_path / "out", logits(model))
    assert sizes(pruned) == expected_sizes(geometry)


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_fewer_layers_than_config_json_says(tmp_path, capsys, model_type):
    model = tiny_model(model_type, 3, 3, 20)
    model.save_pretrained(tmp_path / "in")
    gone = [name for name in stored(tmp_path / "in") if name.startswith("model.layers.2.")]
    edit_weights(tmp_path / "in", {}, tuple(gone))
    before = model.num_parameters()
    model.model.layers = model.model.layers[:2]
    pruned = assert_converts(tmp_path / "in", tmp_path / "out", logits(model))
    printed = capsys.readouterr().out
    assert len(pruned.model.layers) == 2 and "The files have 2 layers" in printed
    assert f"Parameters: {before:,} before, {pruned.num_parameters():,} after" in printed


def test_size_lists_say_what_the_tensors_have(tmp_path, capsys):
    geometry = ("llama", 6, 6, [[0, 2], [], [4]], [40, 3, 7])
    model = cut_directory(tmp_path / "in", geometry)
    edit_json(tmp_path / "in" / "config.json", layer_head_num=[2, 0, 1], layer_inter_size=[40, 3, 7], layer_num=3)
    pruned = assert_converts(tmp_path / "in", tmp_path / "out", logits(model))
    assert not hasattr(pruned.config, "layer_head_num")
    edit_json(tmp_path / "in" / "config.json", layer_head_num=[2, 1, 1])
    assert convert_pruned(tmp_path / "in", tmp_path / "out2") == 2
    assert "layer_head_num is [2, 1, 1], the tensors have [2, 0, 1]" in capsys.readouterr().err


# What config.json says of a model with a hidden size of 80 and 6 heads of 32, and what --base-model says.
HIDDEN = {
    "explicit head_dim": ({"hidden_size": 96, "head_dim": 32}, None, None),
    "of the size before": ({"hidden_size": 192, "head_dim": None}, None, None),
    "of the size after": ({"hidden_size": 80, "head_dim": None}, None, "head_dim is 13"),
    "of the size after, with the dense model": ({"hidden_size": 80, "head_dim": None}, {}, None),
    "of another head_dim": ({"hidden_size": 96, "head_dim": None}, None, "12 heads of head_dim 16"),
    "of another head_dim, with the dense model": ({"hidden_size": 96, "head_dim": None}, {}, None),
}


@pytest.mark.parametrize(("config", "base", "message"), HIDDEN.values(), ids=HIDDEN)
def test_hidden_size_of_the_tensors(tmp_path, capsys, config, base, message):
    # Mistral computes what Llama does, and takes any hidden size.
    model = tiny_model("mistral", 6, 6, 40, hidden_size=80, sliding_window=None)
    model.save_pretrained(tmp_path / "in")
    llama = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    edit_json(tmp_path / "in" / "config.json", **llama, **config)
    args = []
    if base is not None:
        tiny_model("llama", 6, 6, 40, hidden_size=192).save_pretrained(tmp_path / "base")
        args = ["--base-model", tmp_path / "base"]
    if message is not None:
        assert convert_pruned(tmp_path / "in", tmp_path / "out", *args) == 2
        error = capsys.readouterr().err
        assert message in error and "--base-model" in error
        return
    pruned = assert_converts(tmp_path / "in", tmp_path / "out", logits(model), *args)
    assert pruned.config.head_dim == HEAD_DIM and pruned.config.hidden_size == 84  # a multiple of the heads


def test_old_checkpoints_tell_head_dim(tmp_path):
    """3 heads of 32 would pass for the 6 of 16 that config.json, with hidden_size alone corrected, speaks of."""
    model = tiny_model("mistral", 3, 3, 40, sliding_window=None)
    model.save_pretrained(tmp_path / "in")
    replace_weights(tmp_path / "in", cut(model, [ALL3] * 3, [40, 17, 40]), keep_empty=False)
    rotary_embedding = "model.layers.{}.self_attn.rotary_emb.inv_freq".format
    edit_weights(tmp_path / "in", {rotary_embedding(index): torch.ones(16) for index in range(3)})
    llama = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": None}
    edit_json(tmp_path / "in" / "config.json", **llama, **heads)
    pruned = assert_converts(tmp_path / "in", tmp_path / "out", logits(model))
    assert pruned.config.head_dim == HEAD_DIM and sizes(pruned)[0] == (3, 3, 40)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "qwen2_moe"])
def test_experts_of_any_width(tmp_path, model_type):
    model = tiny_model(model_type, 3, 3, 24, num_hidden_layers=2)
    model.save_pretrained(tmp_path / "in")
    modules = ("w1", "w3", "w2") if model_type == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    prefix = "block_sparse_moe" if model_type == "mixtral" else "mlp"
    widths, tensors, remove = [[24, 5, 0, 1], [1, 1, 2, 24]], stored(tmp_path / "in"), []
    for layer, of_experts in enumerate(widths):
        for expert, width in enumerate(of_experts):
            model.model.layers[layer].mlp.experts.down_proj[expert, :, width:] = 0
            gate, up, down = (f"model.layers.{layer}.{prefix}.experts.{expert}.{name}.weight" for name in modules)
            tensors |= {name: tensors[name][:width] for name in (gate, up)}
            tensors[down] = tensors[down][:, :width].contiguous()
            remove += [gate, up, down] if not width else []
    edit_weights(tmp_path / "in", tensors, tuple(remove))
    assert_converts(tmp_path / "in", tmp_path / "out", logits(model))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    found = [config["per_layer_config"][str(layer)]["expert_intermediate_sizes"] for layer in range(2)]
    assert found == widths


def test_fewer_experts_than_config_json_says(tmp_path, capsys):
    model = tiny_model("qwen3_moe", 3, 3, 24, num_hidden_layers=2)
    model.save_pretrained(tmp_path / "in")
    path = tmp_path / "in" / "config.json"
    key = "num_local_experts" if "num_local_experts" in json.loads(path.read_text()) else "num_experts"
    edit_json(path, **{key: 7})
    pruned = assert_converts(tmp_path / "in", tmp_path / "out", logits(model))
    assert pruned.config.num_experts == 4 and "A layer has 4 experts" in capsys.readouterr().out


# What config.json says is the number before pruning, or that of some layer.
@pytest.mark.parametrize("said", [4, 2])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "qwen2_moe", "olmoe", "glm4_moe", "deepseek_v3"])
def test_other_numbers_of_experts_in_every_layer(tmp_path, capsys, model_type, said):
    """As REAP's kin write them; one expert has no tensors, but a row of the router: it adds zeros."""
    model = tiny_model(model_type, 6, 3, 24)
    model.save_pretrained(tmp_path / "in")
    keep_experts(tmp_path / "in", model, [[0, 2, 3], [3, 1], [0, 1, 2, 3]], silent=((2, 1),))
    path = tmp_path / "in" / "config.json"
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    keys = [key for key in names if key in json.loads(path.read_text())]
    edit_json(path, **dict.fromkeys(keys, said))
    pruned = assert_converts(tmp_path / "in", tmp_path / "out", logits(model))
    assert f"A layer has 2 to 4 experts, where config.json says {said}." in capsys.readouterr().out
    assert [len(layer.mlp.experts) for layer in pruned.model.layers] == [3, 2, 4]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["per_layer_config"]["1"]["num_experts"] == 2
    assert "exact" not in config["pruning"], "convert-pruned dropped nothing"
    # Now that silent expert goes, too.
    assert convert_pruned(tmp_path / "in", tmp_path / "fewer", "--drop-empty-experts") == 0
    config = json.loads((tmp_path / "fewer" / "config.json").read_text())
    assert config["per_layer_config"]["2"] == {"num_experts": 3}
    assert config["pruning"]["dropped_experts"] == {"2": [1]}


def test_fewer_experts_than_the_router_chooses_are_refused(tmp_path, capsys):
    model = tiny_model("qwen3_moe", 3, 3, 24)
    model.save_pretrained(tmp_path / "in")
    keep_experts(tmp_path / "in", model, [[0, 2, 3], [3], [0, 1, 2, 3]])
    assert convert_pruned(tmp_path / "in", tmp_path / "out") == 2
    assert "model.layers.1: num_experts is 1, but the router chooses 2" in capsys.readouterr().err


BROKEN = {
    "q and o": ("self_attn.o_proj", (96, 64), "q_proj, k_proj, v_proj, o_proj have 192, 192, 192, 64"),
    "k and v": ("self_attn.v_proj", (32, 96), "do not belong together; head_dim is 32"),
    "part of a head": ("self_attn.q_proj", (50, 96), "have 50, 192, 192, 192"),
    "gate and up": ("mlp.up_proj", (7, 96), "gate_proj, up_proj, down_proj have 40, 7, 40"),
    "one dimension": (
        "mlp.up_proj",
        (40,),
        "up_proj.weight: shape [40]; a weight has two dimensions",
    ),
    "no down": ("mlp.down_proj", (96, 0), "gate_proj, up_proj, down_proj have 40, 40, 0"),
    "hidden size": ("mlp.gate_proj", (40, 95), "the file has [40, 95], config.json says [40, 96]"),
}


@pytest.mark.parametrize(("name", "shape", "message"), BROKEN.values(), ids=BROKEN)
def test_shapes_that_contradict_each_other_are_refused(tmp_path, capsys, name, shape, message):
    tiny_model("llama", 6, 6, 40).save_pretrained(tmp_path / "in")
    edit_weights(tmp_path / "in", {f"model.layers.1.{name}.weight": torch.ones(shape)})
    assert convert_pruned(tmp_path / "in", tmp_path / "out") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
