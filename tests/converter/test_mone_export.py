"""Models that lost whole experts, exported as MoNE's: what is read again is the same model, config.json is stock."""

import json

import pytest
import torch
from helpers.dropped import write_mone
from helpers.imports import logits
from helpers.masked import convert_pruned, edit_json
from helpers.tiny import converted, expert_masks, masks_for, tiny_model

from converter import cli
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.hf import load_pruned

# Whole experts of three layers, in the others that are gone nothing is left.
WHOLE = {
    "one each": [[24, 0, 24, 24], [24, 24, 24, 24], [0, 24, 24, 0]],
    "all of a layer": [[24] * 4, [0] * 4, [24] * 4],
}


def exported(directory, out) -> ModelGeometry:
    assert cli.main(["export", str(out), str(directory / "mone")]) == 0
    assert convert_pruned(directory / "mone", directory / "again", "--from", "mone") == 0
    config = json.loads((directory / "mone" / "config.json").read_text())
    assert not {"per_layer_config", "pruning"} & config.keys()
    assert not config["architectures"][0].startswith("Pruned")
    return ModelGeometry.from_config(json.loads((directory / "again" / "config.json").read_text()))


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("model_type", ["mixtral", "olmoe", "qwen3_moe", "glm4_moe"])
def test_experts_without_channels_become_constants_of_zeros(tmp_path, model_type, name):
    model = tiny_model(model_type, 6, 3, 24, **({} if model_type == "olmoe" else {"hidden_size": 192}))
    out = converted(tmp_path, model, expert_masks(model, WHOLE[name]))
    geometry = exported(tmp_path, out)
    assert [layer.expert_intermediate_sizes for layer in geometry.layers] == [tuple(row) for row in WHOLE[name]]
    listed = json.loads((tmp_path / "mone" / "config.json").read_text())["approximate_experts"]
    gone = {str(index): [at for at, width in enumerate(row) if not width] for index, row in enumerate(WHOLE[name])}
    assert listed == {index: experts for index, experts in gone.items() if experts}
    torch.testing.assert_close(logits(load_pruned(tmp_path / "again")), logits(load_pruned(out)), rtol=0, atol=1e-5)


def test_constants_stay_constants(tmp_path):
    model = tiny_model("qwen3_moe", 6, 3, 24)
    write_mone(tmp_path / "in", model, {0: [3], 2: [1, 0]})
    assert convert_pruned(tmp_path / "in", tmp_path / "out") == 0
    geometry = exported(tmp_path, tmp_path / "out")
    assert [layer.constant_experts for layer in geometry.layers] == [(3,), (), (0, 1)]
    torch.testing.assert_close(logits(load_pruned(tmp_path / "again")), logits(model), rtol=1e-4, atol=1e-4)


def narrow(directory):
    model = tiny_model("qwen3_moe", 6, 3, 24)
    return converted(directory, model, expert_masks(model, [[24, 0, 24, 24], [24, 23, 24, 24], [24] * 4]))


def heads(directory):
    model = tiny_model("qwen3_moe", 6, 3, 24)
    masks = expert_masks(model, WHOLE["one each"])
    return converted(directory, model, masks | masks_for([[1, 1, 0, 0, 1, 1]], [], model))


def dropped(directory):
    model = tiny_model("qwen3_moe", 6, 3, 24)
    return converted(
        directory, model, expert_masks(model, [[0, 24, 24, 24], [24] * 4, [24] * 4]), drop_empty_experts=True
    )


def dense(directory):
    tiny_model("llama", 6, 6, 24).save_pretrained(directory / "out")
    return directory / "out"


def quantized(directory):
    out = narrow(directory)
    edit_json(out / "config.json", quantization_config={"quant_method": "compressed-tensors"})
    return out


REFUSED = {
    "a narrow expert": (narrow, "layer 1: expert 1 has 23 channels of 24; it must have all or none"),
    "heads": (heads, "heads, dense MLPs or shared experts are not of one size"),
    "a router with fewer rows": (dropped, "layer 0: the router has 3 rows of 4"),
    "no experts": (dense, "LlamaForCausalLM has no experts that could be constants"),
    "quantized": (quantized, "is quantized"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_mone_cannot_say_is_refused(tmp_path, capsys, name):
    make, message = REFUSED[name]
    out = make(tmp_path)
    assert cli.main(["export", str(out), str(tmp_path / "mone")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "mone").exists()
