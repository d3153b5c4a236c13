"""The masked checkpoint: keys and shapes of masks, pruning.json."""

import json
import subprocess
import sys

import pytest
from helpers.learning import geometry_of
from helpers.tiny import tiny_model

from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.masked import PRUNING_FILE, LayerMasks, PruningInfo, layer_masks, mask_shapes

HEADS, CHANNELS = "model.layers.{}.self_attn.head_mask", "model.layers.{}.mlp.channel_mask"
EXPERTS = "model.layers.{}.mlp.experts.channel_mask"
REQUIRED = {"format_version": 1, "method": "ddp", "channel_mask_site": "product"}


def test_shapes_of_masks_in_dense_layers_and_in_layers_with_experts():
    geometry = geometry_of(tiny_model("qwen2_moe", 6, 3, 40, mlp_only_layers=[1]))
    shapes = mask_shapes(geometry)
    assert shapes == {
        HEADS.format(0): (6,),
        EXPERTS.format(0): (4, 24),
        CHANNELS.format(0): (20,),  # of the shared experts
        HEADS.format(1): (6,),
        CHANNELS.format(1): (40,),
        HEADS.format(2): (6,),
        EXPERTS.format(2): (4, 24),
        CHANNELS.format(2): (20,),
    }
    assert layer_masks(shapes, 2) == [LayerMasks((6,), (20,), (4, 24)), LayerMasks((6,), (40,), None)]
    assert layer_masks({}, 1) == [LayerMasks()]


@pytest.mark.parametrize(
    "info",
    [
        PruningInfo("ddp", "product"),
        PruningInfo("a.b-c", "gate_and_up", "../dense", "adapter"),
        PruningInfo(
            "ddp",
            "product",
            "owner/name",
            None,
            "abc123",
            "config:0123456789abcdef tensors:0123456789abcdef samples:0123456789abcdef",
        ),
    ],
)
def test_pruning_json_is_read_as_it_was_written(tmp_path, info):
    info.write(tmp_path)
    assert PruningInfo.read(tmp_path) == info


def test_unknown_origins_are_not_written(tmp_path):
    PruningInfo("ddp", "product", "owner/name").write(tmp_path)
    written = json.loads((tmp_path / PRUNING_FILE).read_text())
    assert written == {**REQUIRED, "base_model": "owner/name", "lora_adapter": None}


@pytest.mark.parametrize("change", [{}, {"base_model": None}, {"base_revision": None, "base_fingerprint": None}])
def test_absent_and_null_keys_are_the_same(tmp_path, change):
    (tmp_path / PRUNING_FILE).write_text(json.dumps(REQUIRED | change))
    assert PruningInfo.read(tmp_path) == PruningInfo("ddp", "product")


def test_every_problem_of_pruning_json_is_reported(tmp_path):
    wrong = {"format_version": 2, "method": "two words", "channel_mask_site": "down", "base_model": 1}
    wrong |= {"lora_adapter": "../x", "base_revision": 5, "base_fingerprint": [], "extra": 1}
    (tmp_path / PRUNING_FILE).write_text(json.dumps(wrong))
    with pytest.raises(InputError) as error:
        PruningInfo.read(tmp_path)
    assert {problem.split()[0] for problem in error.value.problems} == {*wrong, "unknown"} - {"extra"}


def test_formats_need_neither_torch_nor_vllm():
    code = (
        "import pkgutil, importlib, sys, pruned_vllm.formats as formats\n"
        "for module in pkgutil.iter_modules(formats.__path__):\n"
        "    importlib.import_module(f'pruned_vllm.formats.{module.name}')\n"
        "assert not {'torch', 'vllm', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
