"""EvoPress's list of dropped sublayers."""

import pytest
from helpers.imports import assert_converts, dropped, logits, sizes, write_list
from helpers.masked import convert_pruned
from helpers.tiny import tiny_model

CASES = {
    "each kind": ("llama", {}, ["attn", "mlp", "attn+mlp"]),
    "none": ("mistral", {}, ["none", "none", "attn+mlp"]),
    "biases go with their sublayers": (
        "llama", {"attention_bias": True, "mlp_bias": True}, ["attn", "none", "attn+mlp"],
    ),
    "norms of q and k": ("qwen3", {}, ["attn", "mlp", "none"]),
    "experts": ("qwen3_moe", {}, ["attn", "mlp", "none"]),
    "experts, and those of all tokens": ("qwen2_moe", {}, ["attn", "mlp", "none"]),
    "heads that go together": ("olmoe", {}, ["attn", "mlp", "none"]),
    "one layer": ("llama", {"num_hidden_layers": 1}, ["attn"]),
}  # fmt: skip


@pytest.mark.parametrize(("model_type", "config", "lines"), CASES.values(), ids=CASES)
def test_dropped_sublayers_add_nothing(tmp_path, model_type, config, lines):
    model = tiny_model(model_type, 6, 6 if model_type == "olmoe" else 3, 40, **config)
    model.save_pretrained(tmp_path / "base")
    write_list(tmp_path / "in", lines)
    (tmp_path / "in" / "final_model.pth").write_bytes(b"not read")
    pruned = assert_converts(
        tmp_path / "in", tmp_path / "out", logits(dropped(model, lines)), "--base-model", tmp_path / "base"
    )
    without_heads = [heads == 0 for heads, _, _ in sizes(pruned)]
    assert without_heads == ["attn" in line for line in lines]


def test_the_list_itself_and_weights_beside_it(tmp_path):
    model, lines = tiny_model("llama", 6, 6, 40), ["none", "mlp", "attn"]
    model.save_pretrained(tmp_path / "in")
    write_list(tmp_path / "in", lines, "mine.txt")
    expected = logits(dropped(model, lines))
    assert_converts(tmp_path / "in" / "mine.txt", tmp_path / "out", expected)
    write_list(tmp_path / "in", lines)
    assert_converts(tmp_path / "in", tmp_path / "out2", expected)


BAD = {
    "too few lines": (["none", "attn"], "has 2 lines, the model in"),
    "another word": (["none", "attn", "ffn"], "holds 'ffn'; a line for each layer must be one of none, attn, mlp"),
    "nothing": ([], "holds 'nothing'"),
}


@pytest.mark.parametrize(("lines", "message"), BAD.values(), ids=BAD)
def test_bad_lists_are_refused(tmp_path, capsys, lines, message):
    tiny_model("llama", 6, 6, 40).save_pretrained(tmp_path / "base")
    write_list(tmp_path / "in", lines)
    assert convert_pruned(tmp_path / "in", tmp_path / "out", "--base-model", tmp_path / "base") == 2
    assert message in capsys.readouterr().err


def test_what_a_list_lacks_is_said(tmp_path, capsys):
    write_list(tmp_path / "in", ["none", "mlp", "attn"])
    assert convert_pruned(tmp_path / "in", tmp_path / "out") == 2
    assert "give the dense model that it belongs to with --base-model" in capsys.readouterr().err
