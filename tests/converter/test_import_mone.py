"""MoNE's constants in place of experts, in both forms, against a model in which these experts output the constants."""

import json

import pytest
import torch
from helpers.dropped import write_mone
from helpers.imports import assert_converts, logits
from helpers.masked import convert_pruned, edit_json, edit_weights
from helpers.tiny import HF_MOE, stored_numbers, tiny_model

from converter.quantize.converted import plan_of_converted
from converter.quantize.schemes import SCHEMES, Wanted
from pruned_vllm.formats.families import FAMILIES
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.hf import load_pruned

# gpt-oss has all experts of a layer in one tensor, which MoNE does not know.
MODEL_TYPES = [name for name in HF_MOE if FAMILIES[name].experts_format.fused is None]
REPLACED = {0: [3], 2: [1, 0, 2, 3]}  # the last expert of a layer, and all of them


@pytest.mark.parametrize(
    ("model_type", "declared"),
    [*((name, False) for name in MODEL_TYPES), *((name, True) for name in ("mixtral", "deepseek_v3"))],
)
def test_constants_are_biases_of_experts_without_channels(tmp_path, capsys, model_type, declared):
    model = tiny_model(model_type, 6, 3, 24)
    write_mone(tmp_path / "in", model, REPLACED, declared)
    pruned = assert_converts(tmp_path / "in", tmp_path / "out", logits(model))
    printed = capsys.readouterr().out
    assert "Experts that output a constant: 5." in printed and "Verified against the pruned model: " in printed
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    geometry = ModelGeometry.from_config(config)
    assert [layer.constant_experts for layer in geometry.layers] == [(3,), (), (0, 1, 2, 3)]
    assert geometry.layers[0].expert_intermediate_sizes == (24, 24, 24, 0)
    assert not {"approximate_experts", "compression_config"} & set(config) and "exact" not in config["pruning"]
    assert stored_numbers(pruned) == geometry.num_parameters
    pruned.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(load_pruned(tmp_path / "saved")), logits(pruned), rtol=0, atol=1e-5)


def test_constants_stay_when_empty_experts_are_dropped(tmp_path, capsys):
    model = tiny_model("qwen3_moe", 6, 3, 24)
    write_mone(tmp_path / "in", model, REPLACED)
    assert convert_pruned(tmp_path / "in", tmp_path / "out", "--drop-empty-experts") == 0
    assert "No expert lost all its channels" in capsys.readouterr().out
    torch.testing.assert_close(logits(load_pruned(tmp_path / "out")), logits(model), rtol=1e-4, atol=1e-4)


def test_constants_are_not_quantized(tmp_path):
    model = tiny_model("qwen3_moe", 6, 3, 24)
    write_mone(tmp_path / "in", model, REPLACED)
    assert convert_pruned(tmp_path / "in", tmp_path / "out") == 0
    written = plan_of_converted(tmp_path / "out", Wanted(SCHEMES["w8a8-int8"])).written
    constants = {name: dtype for name, dtype in written.dtypes.items() if name.endswith("down_proj.bias")}
    assert len(constants) == 5 and set(constants.values()) == {"F32"}


def test_names_of_older_releases(tmp_path):
    model = tiny_model("olmoe", 6, 3, 24)
    write_mone(tmp_path / "in", model, REPLACED)
    edit_json(tmp_path / "in" / "config.json", model_type="olmoe_compressed", architectures=["OlmoneForCausalLM"])
    assert_converts(tmp_path / "in", tmp_path / "out", logits(model))


def remove_a_constant(directory) -> None:
    edit_weights(directory, {}, ("model.layers.2.mlp.experts.1.approx_value",))


def lists(value):
    return lambda directory: edit_json(directory / "config.json", approximate_experts=value)


def declares(**changes):
    def change(directory) -> None:
        content = json.loads((directory / "config.json").read_text())
        declared = {"version": 1, "router_semantics": {}, "targets": {}, **changes}
        content["compression_config"] = {"transform_config": {"expert_substitution": declared}}
        del content["approximate_experts"]
        (directory / "config.json").write_text(json.dumps(content))

    return change


BROKEN = {
    "a constant is missing": (remove_a_constant, "mlp.experts.1.approx_value: missing, the constant of expert 1 of"),
    "another layer": (lists({"7": [0]}), "layer 7 has no expert 0"),
    "another expert": (lists({"0": [4]}), "layer 0 has no expert 4"),
    "twice": (lists({"0": [3, 3]}), "config.json replaces expert 3 of layer 0 twice"),
    "no mapping": (lists([[3]]), "approximate_experts is not what vLLM 0.33 reads"),
    "no list": (lists({"0": 3}), "approximate_experts is not what vLLM 0.33 reads"),
    "no numbers": (lists({"zero": [3]}), "approximate_experts is not what vLLM 0.33 reads"),
    "negative": (lists({"0": [-1]}), "-1 is no number of a layer or an expert"),
    "huge": (lists({"0": [10**30]}), "is no number of a layer or an expert"),
    "fewer than the files have": (lists({"0": [3]}), "not a tensor of Qwen3MoeForCausalLM; it would be lost"),
    "another version": (declares(version=2), "expert_substitution is not what vLLM 0.33 reads"),
    "another routing": (declares(), "version must be 1, and routing unchanged"),
    "no targets": (declares(targets=None), "expert_substitution is not what vLLM 0.33 reads"),
}


@pytest.mark.parametrize(("break_it", "message"), BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_read_is_refused(tmp_path, capsys, break_it, message):
    model = tiny_model("qwen3_moe", 6, 3, 24)
    write_mone(tmp_path / "in", model, REPLACED)
    break_it(tmp_path / "in")
    assert convert_pruned(tmp_path / "in", tmp_path / "out") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_models_without_experts_are_refused(ckpt, tmp_path, capsys):
    (ckpt / "pruning_masks.safetensors").unlink()
    (ckpt / "pruning.json").unlink()
    edit_json(ckpt / "config.json", approximate_experts={"0": [1]})
    assert convert_pruned(ckpt, tmp_path / "out") == 2
    assert "LlamaForCausalLM has no experts that could be constants" in capsys.readouterr().err
