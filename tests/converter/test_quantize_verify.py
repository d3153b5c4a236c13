"""quantize-pruned --verify: wrong weights are found before the model appears; errors are as rounding predicts."""

import pytest
import torch
from helpers.quantized import (
    check_refused,
    quantize_pruned,
    write_model,
)
from helpers.tiny import tiny_model

from converter.quantize import library
from converter.quantize.schemes import SCHEMES


def of_wrong_outputs(parts):
    return parts | {"_scale": parts["_scale"].roll(1, 0)}


def of_the_whole(parts):
    return parts | {"_scale": parts["_scale"].amax().expand_as(parts["_scale"])}


def with_lost_bits(parts):
    name = "_packed" if "_packed" in parts else ""
    stored = parts[name].clone()
    stored.view(-1).view(torch.uint8)[:1] ^= 0x70
    return parts | {name: stored}


FAULTS = {"scales of other outputs": of_wrong_outputs, "one scale": of_the_whole, "a bit": with_lost_bits}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_weight_is_found_before_the_model_appears(tmp_path, capsys, monkeypatch, fault, scheme):
    out, right = write_model(tmp_path, "ragged"), library.Rounding.round
    monkeypatch.setattr(library.Rounding, "round", lambda *args: FAULTS[fault](right(*args)))
    args = [out, tmp_path / "quantized", "--scheme", scheme]
    messages = ["is not the model rounded to the nearest value", "weights are off by more than half a step"]
    check_refused(capsys, tmp_path, ["ckpt", "out"], *args, messages=messages)
    assert quantize_pruned(*args, "--no-verify") == 0


def test_errors_are_those_that_rounding_predicts(tmp_path, capsys):
    tiny_model("llama", 6, 6, 512).save_pretrained(tmp_path / "out")
    for scheme in SCHEMES:
        assert quantize_pruned(tmp_path / "out", tmp_path / scheme, "--scheme", scheme) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines() if "relative rms error" in line]
        assert len(lines) == 7
        for kind, *_, found, _, _, predicted in lines:
            assert float(found.rstrip(",")) == pytest.approx(float(predicted), rel=0.1), f"{scheme}, {kind}"


def test_very_small_weights_of_float16_are_refused_and_not_lost(tmp_path, capsys):
    model = tiny_model("mistral", 6, 3, 40).half()
    model.model.layers[1].self_attn.k_proj.weight.mul_(1e-4)
    model.save_pretrained(tmp_path / "out")
    args = [tmp_path / "out", tmp_path / "quantized", "--scheme", "w8a8-int8"]
    check_refused(capsys, tmp_path, ["out"], *args, messages=["Weights of float16 that are very small", "k_proj"])
