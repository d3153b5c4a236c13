"""Reports of what pruning left: numbers that fit the masks, and pictures where they belong."""

import json
import sys

import numpy as np
import pytest
import torch
from helpers.masked import RAGGED, convert_pruned
from helpers.tiny import byte_tokenizer, converted, expert_masks, masks_for, tiny_model, write_masked
from safetensors.torch import load_file

from converter import cli
from learner import cli as learner_cli
from pruned_vllm.common.manifest import MANIFEST
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.pattern import pattern_of_geometry, pattern_of_masks, write_report

PICTURES = [MANIFEST, "ffn.png", "heads.png", "pattern.json"]


def report(directory) -> dict:
    """The numbers, once the pictures beside them have been found to be pictures."""
    for picture in directory.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 3000, picture
    return json.loads((directory / "pattern.json").read_text())


def names(directory) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def geometry(directory) -> ModelGeometry:
    return ModelGeometry.from_config(json.loads((directory / "config.json").read_text()))


def test_converted_directory_is_plotted_beside_its_weights(ckpt, tmp_path, capsys):
    out = tmp_path / "out"
    assert convert_pruned(ckpt, out) == 0
    before = names(out)
    assert cli.main(["inspect", str(out), "--plot"]) == 0 and "Wrote" in capsys.readouterr().out
    assert names(out) == sorted([*before, "report"]) and names(out / "report") == PICTURES
    pattern = report(out / "report")
    assert [sum(layer["heads"]) for layer in pattern["layers"]] == [4, 1, 6]
    assert [layer["channels"] for layer in pattern["layers"]] == [17, 1, 20]
    assert [layer["channels_removed"] for layer in pattern["layers"]] == pytest.approx([23 / 40, 39 / 40, 0.5])
    assert pattern["dense"]["num_attention_heads"] == 6 and not pattern["head_positions_known"]
    assert cli.main(["inspect", str(out), "--plot"]) == 0, "a report may be replaced"
    assert convert_pruned(ckpt, out, "--overwrite", "--plot") == 0, "a report does not stand in the way"
    assert report(out / "report") == pattern


def test_masks_say_which_heads_are_left(ckpt, tmp_path):
    pattern = pattern_of_masks(geometry(ckpt), {name: mask.numpy() for name, mask in RAGGED.items()})
    write_report(pattern, tmp_path)
    assert names(tmp_path / "report") == sorted([*PICTURES, "mask_values.png"])
    assert report(tmp_path / "report") == pattern
    assert [layer["heads"] for layer in pattern["layers"]] == [[1, 0, 1, 0, 1, 1], [0, 0, 0, 1, 0, 0], [1] * 6]
    assert [layer["channels"] for layer in pattern["layers"]] == [17, 1, 20]
    heads = pattern["mask_values"]["head"]
    assert sum(heads["counts"]) == 11 and (heads["edges"][0], heads["edges"][-1]) == (-0.5, 2.5)


def test_query_groups_are_filled_from_the_left(tmp_path):
    """[3, 1, 2] of groups of 4, then a layer that lost a KV head, and one without attention."""
    heads = [[1, 1, 0, 1, 0, 0, 1, 0, 1, 0, 0, 1], [0] * 4 + [1] * 8, [0] * 12]
    out = converted(tmp_path, tiny_model("llama", 12, 3, 40), masks_for(heads, []))
    rows = [layer["heads"] for layer in pattern_of_geometry(geometry(out))["layers"]]
    assert rows == [[1, 1, 1, 0, 1, 0, 0, 0, 1, 1, 0, 0], [1] * 8 + [0] * 4, [0] * 12]


def test_experts(tmp_path):
    model = tiny_model("qwen3_moe", 6, 3, 40, mlp_only_layers=[1])
    masks = expert_masks(model, [[17, 0, 24, 5], [1, 2, 3, 4]], [11])
    assert convert_pruned(write_masked(tmp_path / "ckpt", model, masks), tmp_path / "out", "--plot") == 0
    assert "experts.png" in names(tmp_path / "out" / "report")
    pattern = report(tmp_path / "out" / "report")
    assert [layer["expert_widths"] for layer in pattern["layers"]] == [[17, 0, 24, 5], [], [1, 2, 3, 4]]
    assert [layer["channels"] for layer in pattern["layers"]] == [0, 11, 0]
    assert pattern["layers"][0]["channels_removed"] == pytest.approx(1 - 46 / 96)
    of_masks = pattern_of_masks(geometry(tmp_path / "ckpt"), {name: np.asarray(mask) for name, mask in masks.items()})
    assert of_masks["layers"] == pattern["layers"]


def test_learn_masks_reports_its_masks(ckpt, tmp_path):
    byte_tokenizer().save_pretrained(ckpt)
    arguments = [str(ckpt), str(tmp_path / "learned"), "--method", "random", "--report"]
    assert learner_cli.main(arguments) == 0
    masks = load_file(tmp_path / "learned" / "pruning_masks.safetensors")
    pattern = report(tmp_path / "learned" / "report")
    assert pattern == pattern_of_masks(geometry(ckpt), {name: mask.numpy() for name, mask in masks.items()})
    assert learner_cli.main([*arguments, "--overwrite"]) == 0, "a report does not stand in the way"


def test_equal_layers_have_no_pattern_in_config_json(ckpt, tmp_path, capsys):
    model = tiny_model("llama", 6, 6, 40)
    masks = masks_for([[1, 1, 1, 0, 0, 0]] * 3, [torch.arange(40) < 8] * 3)
    assert convert_pruned(write_masked(tmp_path / "even", model, masks), tmp_path / "out", "--plot") == 0
    assert [layer["channels"] for layer in report(tmp_path / "out" / "report")["layers"]] == [8] * 3
    assert cli.main(["inspect", str(tmp_path / "out"), "--plot"]) == 2
    assert "all layers are equal (3 query heads)" in capsys.readouterr().err


def test_wrong_calls_write_nothing(ckpt, tmp_path, capsys, monkeypatch):
    for wrong in ([ckpt], [ckpt, tmp_path / "out", "--plot", "--dry-run"]):
        with pytest.raises(SystemExit):
            convert_pruned(*wrong)
    assert cli.main(["inspect", str(ckpt), "--plot"]) == 2 and "is no converted model" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert convert_pruned(ckpt, tmp_path / "out", "--plot") == 2
    assert "pip install matplotlib" in capsys.readouterr().err
    assert names(tmp_path) == ["ckpt"]


def test_a_report_does_not_outlive_its_model(ckpt, tmp_path):
    out = tmp_path / "out"
    assert convert_pruned(ckpt, out) == 0 and cli.main(["inspect", str(out), "--plot"]) == 0
    assert convert_pruned(ckpt, out, "--overwrite") == 0
    assert "report" not in names(out)


def test_foreign_directory_is_kept(ckpt, tmp_path, capsys):
    out = tmp_path / "out"
    assert convert_pruned(ckpt, out) == 0
    (out / "report").mkdir()
    (out / "report" / "mine.txt").write_text("mine")
    assert cli.main(["inspect", str(out), "--plot"]) == 2 and "not written by this command" in capsys.readouterr().err
    assert names(out / "report") == ["mine.txt"]
