"""convert-pruned inspect of quantized models."""

import json

import pytest
from helpers.quantized import (
    quantize_pruned,
    tensors_of,
    write_model,
)
from safetensors.torch import save_file

from converter import cli
from converter.quantize.schemes import SCHEMES, describe_quantization


def test_inspection_knows_quantized_models(tmp_path, capsys):
    out = write_model(tmp_path, "experts")
    assert quantize_pruned(out, tmp_path / "quantized", "--scheme", "w8a8-int8") == 0
    capsys.readouterr()
    assert cli.main(["inspect", str(tmp_path / "quantized"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "converted" and found["dtypes"] == ["BF16", "I8"]
    expected = {"scheme": "w8a8-int8", "format": "int-quantized", "num_bits": 8, "group_size": None}
    assert {key: found["quantization"][key] for key in expected} == expected
    tensors, before = tensors_of(tmp_path / "quantized"), tensors_of(out)
    assert found["bytes"]["pruned"] == sum(tensor.nbytes for tensor in tensors.values())
    assert found["kv_cache_bytes_per_token"]["pruned"] == 2 * 3 * 3 * 32 * 2
    for layer in found["layers"]:
        prefix = f"model.layers.{layer['layer']}."
        assert layer["bytes"] == sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith(prefix))
    for batch_size in (1, 8):
        unread = 0.5**batch_size  # two of four experts are chosen
        steps = []
        for stored in (before, tensors):
            bytes_read = sum(
                tensor.nbytes * (1 - unread if ".experts." in name else 1)
                for name, tensor in stored.items()
                if "embed_tokens" not in name
            )
            steps.append(bytes_read + batch_size * (96 * 2 + 1024 * 2 * 3 * 3 * 32 * 2))
        assert found["quantization"]["ideal_speedup"][str(batch_size)] == pytest.approx(steps[0] / steps[1])
    assert found["ideal_speedup"]["1"]["bytes"] > found["quantization"]["ideal_speedup"]["1"]
    assert cli.main(["inspect", str(tmp_path / "quantized")]) == 0
    printed = capsys.readouterr().out
    assert "Quantization: w8a8-int8, 8 bits." in printed and "Quantization by vLLM" not in printed


@pytest.mark.parametrize("scheme", SCHEMES)
def test_inspection_knows_stock_models_that_are_quantized(tmp_path, capsys, scheme):
    assert quantize_pruned(write_model(tmp_path, "dense"), tmp_path / "quantized", "--scheme", scheme) == 0
    capsys.readouterr()
    assert cli.main(["inspect", str(tmp_path / "quantized"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "stock" and found["quantization"]["scheme"] == scheme
    assert found["quantization"]["group_size"] == (32 if scheme == "w4a16" else None)
    assert cli.main(["inspect", str(tmp_path / "quantized")]) == 0
    printed = capsys.readouterr().out
    assert "GB before." in printed and "before pruning" not in printed


HOSTILE = {
    "a string": "fp8",
    "an empty one": {},
    "lists everywhere": {"config_groups": [], "format": [], "quant_method": []},
    "no group": {"config_groups": {}, "quant_method": "compressed-tensors"},
    "numbers": {"config_groups": {"a": 3}, "format": 4, "quant_method": 5},
    "no bits": {"config_groups": {"a": {"weights": {"num_bits": "8", "group_size": True}, "input_activations": 1}}},
    "a long name": {"quant_method": "a" * 10_000},
    "control characters": {"quant_method": "\x1b[31m"},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_config_that_says_anything_is_described(name):
    found = describe_quantization({"quantization_config": HOSTILE[name]})
    assert (found is None) == (name == "a string")
    assert found is None or all(value is None or value == "compressed-tensors" for value in found.values())


INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64, "symmetric": True}


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ([{"weights": INT4}], ("w4a16", 4, 64)),
        ([{"weights": INT4}, {"weights": INT4}], ("w4a16", 4, 64)),
        ([{"weights": INT4}, {"weights": INT8}], ("compressed-tensors", None, None)),
        ([{"weights": INT4}, {"weights": INT8, "format": "int-quantized", "input_activations": {"dynamic": True}}],
         ("compressed-tensors", None, None)),
        ([{"weights": INT8, "format": "int-quantized", "input_activations": {"dynamic": True}}],
         ("w8a8-int8", 8, None)),
        ([{"weights": INT4 | {"symmetric": False}}], ("compressed-tensors", 4, 64)),
        ([{"weights": INT4, "input_activations": {"dynamic": True}}], ("compressed-tensors", 4, 64)),
    ],
)  # fmt: skip
def test_only_what_is_true_of_all_layers_is_said(groups, expected):
    config_groups = {str(number): group | {"targets": [f"re:.*{number}"]} for number, group in enumerate(groups)}
    stored = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": config_groups}
    found = describe_quantization({"quantization_config": stored})
    assert (found["scheme"], found["num_bits"], found["group_size"]) == expected


def test_native_formats_are_described():
    stored = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}
    expected = {"scheme": "gptq", "format": None, "num_bits": 4, "group_size": 128}
    assert describe_quantization({"quantization_config": stored}) == expected


def test_a_damaged_quantized_model_is_not_described(tmp_path, capsys):
    directory = tmp_path / "quantized"
    assert quantize_pruned(write_model(tmp_path, "experts"), directory, "--scheme", "w8a8-int8") == 0
    lost = "model.layers.0.self_attn.o_proj.weight_scale"
    tensors = {name: tensor for name, tensor in tensors_of(directory).items() if name != lost}
    for path in directory.glob("*.safetensors"):
        path.unlink()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    assert cli.main(["inspect", str(directory)]) == 2
    assert f"{lost} [96, 1]: missing" in capsys.readouterr().err


def test_notes_on_quantization_name_what_reaches_the_experts(tmp_path, capsys):
    assert cli.main(["inspect", str(write_model(tmp_path, "experts"))]) == 0
    printed = capsys.readouterr().out
    for name in ("fp8_per_channel", "int8_per_channel_weight_only", "experts_int8", "quantize-pruned"):
        assert name in printed, name
