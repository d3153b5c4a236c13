"""Heads, channels and hidden dimensions that are exactly zero in models of dense shape."""

import json

import pytest
import torch
from helpers.cut import rows
from helpers.imports import assert_converts, kill_hidden, logits, sizes, stored
from helpers.masked import edit_json, edit_weights
from helpers.tiny import byte_tokenizer, tiny_model

from converter import zero_units
from converter.importers import recognised


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Tensors of many blocks."""
    monkeypatch.setattr(zero_units, "BLOCK", 1000)


def attention(model, layer=0):
    return model.model.layers[layer].self_attn


def mlp(model, layer=0):
    return model.model.layers[layer].mlp


def kill_values(model, heads, layer=0):
    """Rows of v, as FLAP --unstr and NutePrune leave them; q and k too, which says nothing."""
    for projection in (attention(model, layer).q_proj, attention(model, layer).k_proj, attention(model, layer).v_proj):
        projection.weight[rows(heads)] = 0


def kill_outputs(model, heads, layer=0):
    attention(model, layer).o_proj.weight[:, rows(heads)] = 0


def channel(part, *channels):
    def kill(model):
        weight = getattr(mlp(model), f"{part}_proj").weight
        (weight.T if part == "down" else weight)[list(channels)] = 0

    return kill


def scatter(model):
    """Half of all weights, as unstructured pruning leaves them."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.weight"):
            parameter *= torch.rand(parameter.shape, generator=generator) > 0.5


def bias(module_of, *kept):
    """Zeros in a bias but for some units, which it keeps alive."""

    def kill(model):
        values = module_of(model).bias
        values[[unit for unit in range(len(values)) if unit not in kept]] = 0

    return kill


BIASES = {"attention_bias": True, "mlp_bias": True}
# model type, heads, KV heads, config; what is made zero; what stays of the first layer: query heads, KV heads, channels
CASES = {
    "values": ("llama", 6, 6, {}, [lambda m: kill_values(m, [0, 4])], (4, 4, 40)),
    "outputs": ("llama", 6, 6, {}, [lambda m: kill_outputs(m, [5])], (5, 5, 40)),
    "values here, outputs there": (
        "llama", 6, 6, {}, [lambda m: kill_values(m, [1]), lambda m: kill_outputs(m, [3])], (4, 4, 40),
    ),
    "all heads": ("mistral", 6, 6, {}, [lambda m: kill_outputs(m, range(6))], (0, 0, 40)),
    "a KV head": ("llama", 6, 3, {}, [lambda m: attention(m).v_proj.weight.__setitem__(rows([1]), 0)], (4, 2, 40)),
    "query heads of a KV head": ("llama", 6, 3, {}, [lambda m: kill_outputs(m, [2, 3])], (4, 2, 40)),
    "a query head": ("qwen3", 6, 2, {}, [lambda m: kill_outputs(m, [1])], (5, 2, 40)),
    "part of a head": ("llama", 6, 6, {}, [lambda m: attention(m).o_proj.weight[:, :31].zero_()], (6, 6, 40)),
    "queries and keys alone": (
        "llama", 6, 6, {}, [lambda m: attention(m).q_proj.weight.zero_(), lambda m: attention(m).k_proj.weight.zero_()],
        (6, 6, 40),
    ),
    "gate": ("llama", 6, 6, {}, [channel("gate", 0, 39)], (6, 6, 38)),
    "up": ("llama", 6, 6, {}, [channel("up", 7)], (6, 6, 39)),
    "down": ("llama", 6, 6, {}, [channel("down", 1, 2, 3)], (6, 6, 37)),
    "gate, up and down": ("llama", 6, 6, {}, [channel("gate", 1), channel("up", 2), channel("down", 3)], (6, 6, 37)),
    "all channels": ("llama", 6, 6, {}, [channel("up", *range(40))], (6, 6, 0)),
    "bias of v keeps a head": (
        "qwen2", 6, 6, {}, [lambda m: kill_values(m, [0, 4]), bias(lambda m: attention(m).v_proj, *rows([4]))],
        (5, 5, 40),
    ),
    "bias of gate keeps a channel": (
        "llama", 6, 6, BIASES, [channel("gate", 5, 6), bias(lambda m: mlp(m).gate_proj, 6)], (6, 6, 39),
    ),
    "bias of up keeps a channel": (
        "llama", 6, 6, BIASES, [channel("up", 5, 6), bias(lambda m: mlp(m).up_proj, 5)], (6, 6, 39),
    ),
    "biases of a dead layer stay": (
        "llama", 6, 6, BIASES, [lambda m: kill_outputs(m, range(6)), channel("down", *range(40))], (0, 0, 0),
    ),
    "negative zeros": (
        "llama", 6, 6, {},
        [lambda m: attention(m).v_proj.weight[:64].mul_(-0.0), lambda m: mlp(m).up_proj.weight[3:].mul_(0)], (4, 4, 3),
    ),
    "scattered": ("llama", 6, 6, {}, [scatter], (6, 6, 40)),
    "nothing": ("llama", 6, 6, {}, [], (6, 6, 40)),
}  # fmt: skip


@pytest.mark.parametrize(("model_type", "heads", "kv_heads", "config", "kill", "left"), CASES.values(), ids=CASES)
def test_what_is_zero_goes_and_nothing_else(tmp_path, capsys, model_type, heads, kv_heads, config, kill, left):
    model = tiny_model(model_type, heads, kv_heads, 40, **config)
    for step in kill:
        step(model)
    model.save_pretrained(tmp_path / "in")
    pruned = assert_converts(tmp_path / "in", tmp_path / "out", logits(model))
    assert sizes(pruned) == [left, (heads, kv_heads, 40), (heads, kv_heads, 40)]
    printed = capsys.readouterr().out
    nothing = left == (heads, kv_heads, 40)
    assert ("Nothing to cut" in printed) == ("No head, channel or hidden dimension" in printed) == nothing
    if not kill or kill == [scatter]:
        assert ("zeros that are scattered" in printed) == bool(kill)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_float_format(tmp_path, dtype):
    model = tiny_model("llama", 6, 6, 40)
    kill_outputs(model, [2])
    channel("down", 0, 9)(model)
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))
    model.save_pretrained(tmp_path / "in")
    edit_weights(tmp_path / "in", {name: tensor.to(dtype) for name, tensor in stored(tmp_path / "in").items()})
    pruned = assert_converts(tmp_path / "in", tmp_path / "out", logits(model), "--dtype", "float32")
    assert sizes(pruned)[0] == (5, 5, 38)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("config", [{}, BIASES], ids=["no biases", "biases"])
def test_hidden_dimensions(tmp_path, config, tied):
    model = tiny_model("llama", 6, 6, 40, tie_word_embeddings=tied, **config)
    kill_hidden(model, [0, 7, 8, 20, 50, 95, 33, 34])  # 88 of 96 stay, of which the heads make 90
    model.save_pretrained(tmp_path / "in")
    pruned = assert_converts(tmp_path / "in", tmp_path / "out", logits(model))
    assert pruned.config.hidden_size == 90


@pytest.mark.parametrize(
    "revive",
    [
        lambda m: m.model.embed_tokens.weight[3].fill_(1),
        lambda m: attention(m, 2).o_proj.weight[:, 9].fill_(1),
        lambda m: mlp(m, 1).down_proj.bias.fill_(1),
    ],
    ids=["embedding", "o_proj", "bias"],
)
def test_a_hidden_dimension_that_anything_adds_to_stays(tmp_path, revive):
    model = tiny_model("llama", 6, 6, 40, **BIASES)
    kill_hidden(model, [*range(12)])
    revive(model)
    model.save_pretrained(tmp_path / "in")
    pruned = assert_converts(tmp_path / "in", tmp_path / "out", logits(model))
    assert pruned.config.hidden_size == 96


def test_hidden_dimensions_stay_where_a_norm_is_as_wide_as_they_are(tmp_path, capsys):
    model = tiny_model("olmoe", 3, 3, 24)
    model.model.embed_tokens.weight[:, :12] = 0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[:12] = 0
        layer.mlp.experts.down_proj[:, :12] = 0
    model.save_pretrained(tmp_path / "in")
    pruned = assert_converts(tmp_path / "in", tmp_path / "out", logits(model))
    assert pruned.config.hidden_size == 96
    assert "12 hidden dimensions are zero throughout, but stay" in capsys.readouterr().out


@pytest.mark.parametrize("model_type", ["qwen3_moe", "olmoe"])
def test_channels_of_experts(tmp_path, capsys, model_type):
    model = tiny_model(model_type, 3, 3, 24, num_hidden_layers=2)
    experts = model.model.layers[1].mlp.experts
    width = experts.down_proj.shape[-1]
    experts.down_proj[0, :, 3:] = 0
    experts.gate_up_proj[1] = 0
    experts.gate_up_proj[2, width + 5 :] = 0  # rows of up
    kill_outputs(model, [1])
    model.save_pretrained(tmp_path / "in")
    pruned = assert_converts(tmp_path / "in", tmp_path / "out", logits(model))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["per_layer_config"]["1"]["expert_intermediate_sizes"] == [3, 0, 5, width]
    heads = 3 if model_type == "olmoe" else 2  # OLMoE cannot lose heads
    assert pruned.model.layers[0].self_attn.q_proj.weight.shape[0] == heads * 32
    assert ("Some heads are zero, but stay" in capsys.readouterr().out) == (model_type == "olmoe")


def test_models_with_other_norms_than_stock_ones_are_not_taken_for_stock_ones(tmp_path):
    """NutePrune's merged models: the stock class divides by another number in every norm."""
    tiny_model("llama", 6, 6, 40).save_pretrained(tmp_path / "in")
    assert list(recognised(tmp_path / "in")) == ["zeros"]
    edit_json(tmp_path / "in" / "config.json", lora_param="Q.V", lora_rank=8, lora_alpha=8.0)
    assert "zeros" not in recognised(tmp_path / "in")


def test_the_tokenizer_may_be_that_of_the_dense_model(tmp_path, capsys):
    model = tiny_model("llama", 6, 6, 40)
    model.save_pretrained(tmp_path / "in")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    assert_converts(tmp_path / "in", tmp_path / "out", logits(model), "--base-model", tmp_path / "base")
    assert (tmp_path / "out" / "tokenizer.json").is_file() and "there is no tokenizer" not in capsys.readouterr().err
