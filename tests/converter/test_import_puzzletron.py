"""Sizes of each layer in config.json: block_configs in three dialects, AnyModel, per_layer_config of Hugging Face."""

import json
import shutil

import pytest
from helpers.cut import rows
from helpers.dropped import keep_experts
from helpers.imports import assert_converts, logits, sizes
from helpers.masked import convert_pruned, edit_json
from helpers.puzzletron import block, heterogeneous, intermediate, num_kv_heads, overrides, write_subblocks
from helpers.tiny import tiny_model

# KV heads and FFN channels of each layer; 0 for a sublayer that does nothing
LAYERS = [(3, 512), (1, 0), (0, 256)]
SMALL = [(1, 64), (3, 5), (0, 0)]


def in_group(kv_heads):
    return {"n_heads_in_group": 6 // kv_heads, "no_op": False, "window_length": None, "unshifted_sink": False}


def multiple(width):
    """From 2 m 192 / 3 = 128 m on: 100 channels more than the last multiple of 256."""
    return {"ffn_mult": (width - 156) / 128, "no_op": False}


DECI = {
    "model_type": "nemotron-nas",
    "architectures": ["DeciLMForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"},
    "intermediate_size": None,
    "num_key_value_heads": None,
    "head_dim": None,
}
# model type, layers, how attention and FFN are said, changes of config.json
DIALECTS = {
    "Nemotron-NAS": ("llama", LAYERS, in_group, multiple, DECI),
    "DeciLM": ("llama", SMALL, in_group, intermediate, {**DECI, "o_proj_bias": False}),
    "AnyModel": ("llama", SMALL, num_kv_heads, intermediate, {}),
    "AnyModel of Mistral": ("mistral", SMALL, num_kv_heads, intermediate, {}),
    "AnyModel of Qwen3": ("qwen3", SMALL, num_kv_heads, intermediate, {}),
    "one layer": ("llama", [(1, 7)], num_kv_heads, intermediate, {}),
}


@pytest.mark.parametrize(("model_type", "layers", "attention", "ffn", "config"), DIALECTS.values(), ids=DIALECTS)
def test_block_configs(tmp_path, model_type, layers, attention, ffn, config):
    model = heterogeneous(model_type, layers, hidden_size=192)
    write_subblocks(tmp_path / "in", model, layers)
    blocks = [block(kv_heads, width, attention, ffn) for kv_heads, width in layers]
    edit_json(tmp_path / "in" / "config.json", block_configs=blocks, **config)
    pruned = assert_converts(tmp_path / "in", tmp_path / "out", logits(model))
    assert sizes(pruned) == [(6 if kv_heads else 0, kv_heads, width) for kv_heads, width in layers]
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "block_configs" not in written and written["model_type"] == model_type


@pytest.mark.parametrize("o_proj_alone", [False, True])
def test_biases_and_tied_embeddings(tmp_path, o_proj_alone):
    model = heterogeneous("llama", SMALL, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    absent = [f"{name}_proj.bias" for name in "qkv"] if o_proj_alone else []
    for name, parameter in model.named_parameters():
        if absent and name.endswith(tuple(absent)):
            parameter.zero_()
    write_subblocks(tmp_path / "in", model, SMALL, without=("lm_head.weight", *absent))
    blocks = [block(kv_heads, width, in_group, intermediate) for kv_heads, width in SMALL]
    changes = {**DECI, "head_dim": 32} if o_proj_alone else {}
    edit_json(tmp_path / "in" / "config.json", block_configs=blocks, **changes)
    assert_converts(tmp_path / "in", tmp_path / "out", logits(model))


def test_query_heads_whose_kv_head_was_pruned_go(tmp_path):
    """PruneKVHeads keeps all query heads, and makes the columns in o_proj zero of those whose KV head went."""
    layers = [(1, 64), (3, 64)]
    model = heterogeneous("qwen3", layers)
    for index in range(2):  # layer 1 lost no KV head, so its zeros are none of pruning's
        model.model.layers[index].self_attn.o_proj.weight[:, rows([1, 3, 4, 5])] = 0
    write_subblocks(tmp_path / "in", model, layers)
    blocks = [block(kv_heads, width, num_kv_heads, intermediate) for kv_heads, width in layers]
    edit_json(tmp_path / "in" / "config.json", block_configs=blocks)
    pruned = assert_converts(tmp_path / "in", tmp_path / "out", logits(model))
    assert sizes(pruned) == [(2, 1, 64), (6, 3, 64)]


PER_LAYER = {
    "a stock architecture": ("llama", {}),
    "zero-padded": ("mistral", {"key": "{:02}".format}),
    "no size at the top": ("qwen3", {"intermediate_size": None}),
    "AnyModel": (
        "llama", {"architectures": ["AnyModel"], "base_architecture": "LlamaForCausalLM", "anymodel_arch_info": {}},
    ),
    "AnyModel, told by its base": (
        "qwen3", {"architectures": ["AnyModel"], "base_architecture": "Qwen3ForCausalLM", "model_type": "anymodel"},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("model_type", "config"), PER_LAYER.values(), ids=PER_LAYER)
def test_per_layer_config(tmp_path, model_type, config):
    config = dict(config)
    layers = [(1, 64), (3, 5), (0, 0), *[(3, 64)] * 8]  # two digits
    model = heterogeneous(model_type, layers)
    write_subblocks(tmp_path / "in", model, layers)
    entries = overrides(layers, config.pop("key", str))
    edit_json(tmp_path / "in" / "config.json", per_layer_config=entries, **config)
    pruned = assert_converts(tmp_path / "in", tmp_path / "out", logits(model))
    assert sizes(pruned) == [(6 if kv_heads else 0, kv_heads, width) for kv_heads, width in layers]


def test_numbers_of_experts(tmp_path, capsys):
    model = tiny_model("qwen3_moe", 6, 3, 64)
    model.save_pretrained(tmp_path / "in")
    path = tmp_path / "in" / "config.json"
    key = "num_experts" if "num_experts" in json.loads(path.read_text()) else "num_local_experts"
    edit_json(path, per_layer_config={"1": {key: 4, "moe_intermediate_size": 24}})
    assert_converts(tmp_path / "in", tmp_path / "out", logits(model))
    keep_experts(tmp_path / "in", model, [[0, 1, 2, 3], [0, 3, 1], [2, 1]])
    edit_json(path, per_layer_config={"1": {key: 3}, "2": {"num_experts": 2}})
    assert_converts(tmp_path / "in", tmp_path / "out2", logits(model))
    config = json.loads((tmp_path / "out2" / "config.json").read_text())
    assert config["per_layer_config"] == {"1": {"num_experts": 3}, "2": {"num_experts": 2}}
    edit_json(path, per_layer_config={"1": {key: 1}, "2": {"num_experts": 5}})
    assert convert_pruned(tmp_path / "in", tmp_path / "out3") == 2
    error = capsys.readouterr().err
    assert "num_experts is 1, but the router chooses 2" in error and "num_experts is 5, but a layer had 4" in error


def changed_block(index, part, **changes):
    def change(blocks):
        (blocks[index][part] if part else blocks[index]).update(changes)

    return change


REFUSED = {
    "linear attention": (
        changed_block(1, "attention", replace_with_linear=True), "[1].attention: replace_with_linear is True",
    ),
    "linear FFN": (changed_block(0, "ffn", replace_with_linear=True), "[0].ffn: replace_with_linear is True"),
    "mamba": (changed_block(1, "attention", mamba={"state_dim": 1}), "[1].attention: mamba is {'state_dim': 1}"),
    "llama4": (changed_block(1, "attention", llama4={"attention_chunk_size": 8}), "[1].attention: llama4"),
    "experts": (changed_block(0, "ffn", moe={"num_local_experts": 4}), "[0].ffn: moe"),
    "sparse": (changed_block(0, "ffn", sparsify=["2:4"]), "[0].ffn: sparsify"),
    "parallel": (changed_block(1, None, parallel_blocks=[{}]), "[1]: parallel_blocks"),
    "window": (changed_block(0, "attention", window_length=128), "[0].attention: window_length is 128"),
    "activation": (changed_block(0, "ffn", hidden_act="gelu"), "[0].ffn: hidden_act is 'gelu'"),
    "other size": (changed_block(0, "ffn", intermediate_size=63), "the file has [64, 96], config.json says [63, 96]"),
    "other heads": (
        changed_block(0, "attention", num_key_value_heads=2), "the file has [32, 96], config.json says [64, 96]",
    ),
    "odd heads": (changed_block(0, "attention", num_key_value_heads=4), "6 query heads are no multiple of 4 KV heads"),
    "layer missing": (lambda blocks: blocks.pop(), "block_configs has 2 layers, num_hidden_layers is 3"),
    "no object": (lambda blocks: blocks.__setitem__(0, 5), "it must be a list with an object for each layer"),
}  # fmt: skip


@pytest.fixture(scope="module")
def child(tmp_path_factory):
    directory = tmp_path_factory.mktemp("puzzletron") / "in"
    write_subblocks(directory, heterogeneous("llama", SMALL), SMALL)
    return directory


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_blocks_that_cannot_be_expressed_are_refused_by_layer(child, tmp_path, capsys, change, message):
    blocks = [block(kv_heads, width, num_kv_heads, intermediate) for kv_heads, width in SMALL]
    change(blocks)
    shutil.copytree(child, tmp_path / "in")
    edit_json(tmp_path / "in" / "config.json", block_configs=blocks)
    assert convert_pruned(tmp_path / "in", tmp_path / "out") == 2
    assert message in capsys.readouterr().err


def test_a_family_that_is_not_supported_is_named(child, tmp_path, capsys):
    shutil.copytree(child, tmp_path / "in")
    changes = {"block_configs": [{}] * 3, "architectures": ["AnyModel"], "model_type": "nemotron_h"}
    edit_json(tmp_path / "in" / "config.json", **changes)
    assert convert_pruned(tmp_path / "in", tmp_path / "out") == 2
    assert "model_type 'nemotron_h' is not supported" in capsys.readouterr().err
