"""Tyr-the-Pruner's directory of levels and its list, which EvoPress writes alike."""

import pytest
import torch
from helpers.cut import rows
from helpers.imports import assert_converts, logits, sizes
from helpers.levels import DOWN_PROJ, O_PROJ, modules, write_levels
from helpers.masked import convert_pruned
from helpers.tiny import tiny_model

# heads, KV heads; query heads and channels without columns in each layer; what is left of each layer
CASES = {
    "no groups": (6, 6, [[0, 4], [], range(6)], [range(40), [3], []], [(4, 4, 0), (6, 6, 39), (0, 0, 40)]),
    "GQA": (6, 3, [[0, 1], [1, 2], [5]], [[0, 39], range(39), []], [(4, 2, 38), (4, 3, 1), (5, 3, 40)]),
    "one layer": (3, 1, [[0, 2]], [range(20)], [(1, 1, 20)]),
    "one head": (1, 1, [[], [0]], [[], []], [(1, 1, 40), (0, 0, 40)]),
}


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
@pytest.mark.parametrize(("heads", "kv_heads", "dead_heads", "dead_channels", "left"), CASES.values(), ids=CASES)
def test_chosen_matrices_are_taken_and_zero_columns_go(
    tmp_path, model_type, heads, kv_heads, dead_heads, dead_channels, left
):
    model = tiny_model(model_type, heads, kv_heads, 40, num_hidden_layers=len(left))
    model.save_pretrained(tmp_path / "base")
    choice = {module: index % 4 - 2 for index, module in enumerate(modules(model, O_PROJ, DOWN_PROJ))}
    zeros = {f"model.layers.{i}.{O_PROJ}": rows(dead) for i, dead in enumerate(dead_heads)}
    zeros |= {f"model.layers.{i}.{DOWN_PROJ}": list(dead) for i, dead in enumerate(dead_channels)}
    write_levels(tmp_path / "in", model, choice, zeros)
    for given in ("in", "in/tiny-0.5.txt"):
        out = tmp_path / f"out{len(given)}"
        pruned = assert_converts(tmp_path / given, out, logits(model), "--base-model", tmp_path / "base")
        assert sizes(pruned) == left


def test_matrices_of_every_kind(tmp_path):
    """EvoPress's databases hold all matrices of a layer, with zeros anywhere."""
    model = tiny_model("llama", 6, 6, 40)
    model.save_pretrained(tmp_path / "base")
    names = [*(f"self_attn.{name}_proj" for name in "qkvo"), *(f"mlp.{name}_proj" for name in ("gate", "up", "down"))]
    zeros = {f"model.layers.1.{O_PROJ}": rows([2])}
    write_levels(tmp_path / "in", model, dict.fromkeys(modules(model, *names), 1), zeros)
    pruned = assert_converts(tmp_path / "in", tmp_path / "out", logits(model), "--base-model", tmp_path / "base")
    assert sizes(pruned) == [(6, 6, 40), (5, 5, 40), (6, 6, 40)]


def test_several_lists_are_ambiguous(tmp_path, capsys):
    model = tiny_model("llama", 6, 6, 40)
    model.save_pretrained(tmp_path / "base")
    write_levels(tmp_path / "in", model, {f"model.layers.0.{O_PROJ}": 0}, {}, "a.txt")
    (tmp_path / "in" / "notes.txt").write_text("not a list")
    (tmp_path / "in" / "b.txt").write_text(f"model.layers.0.{O_PROJ}: 1\n")
    base = ("--base-model", tmp_path / "base")
    assert convert_pruned(tmp_path / "in", tmp_path / "out", *base) == 2
    error = capsys.readouterr().err
    assert "several lists of levels" in error and "a.txt" in error and "b.txt" in error and "notes.txt" not in error
    assert_converts(tmp_path / "in" / "a.txt", tmp_path / "out", logits(model), *base)


def broken(change):
    def write(directory, model):
        write_levels(directory, model, {f"model.layers.0.{O_PROJ}": 0}, {})
        change(directory)

    return write


LEVEL = f"model.layers.0.{O_PROJ}/0.pth"
BAD = {
    "level missing": (broken(lambda d: (d / LEVEL).unlink()), f"{LEVEL}: missing"),
    "shape": (
        broken(lambda d: torch.save(torch.ones(96, 191), d / LEVEL)), f"{LEVEL}: [96, 191] torch.float32; the dense",
    ),
    "dtype": (broken(lambda d: torch.save(torch.ones(96, 192, dtype=torch.int8), d / LEVEL)), "torch.int8; the dense"),
    "no tensor": (broken(lambda d: torch.save({"weight": torch.ones(1)}, d / LEVEL)), "[96, 192] in a float format"),
    "damaged": (broken(lambda d: (d / LEVEL).write_bytes(b"PK\x03\x04")), "damaged"),
    "no such layer": (
        broken(lambda d: (d / "tiny-0.5.txt").write_text(f"model.layers.3.{O_PROJ}: 0")),
        f"model.layers.3.{O_PROJ}: the dense model has no such matrix",
    ),
    "no list": (broken(lambda d: (d / "tiny-0.5.txt").unlink()), "holds no list of levels"),
}  # fmt: skip


@pytest.mark.parametrize(("write", "message"), BAD.values(), ids=BAD)
def test_bad_levels_are_refused(tmp_path, capsys, write, message):
    model = tiny_model("llama", 6, 6, 40)
    model.save_pretrained(tmp_path / "base")
    write(tmp_path / "in", model)
    assert convert_pruned(tmp_path / "in", tmp_path / "out", "--base-model", tmp_path / "base") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
