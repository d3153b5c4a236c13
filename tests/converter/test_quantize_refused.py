"""quantize-pruned refuses what no kernel takes, bad input and places that are taken, and leaves nothing behind."""

import importlib.util
import math
import shutil

import pytest
import torch
from helpers.limits import files_of_at_most
from helpers.masked import convert_pruned, edit_json, edit_weights
from helpers.quantized import (
    check_refused,
    config_of,
    quantize_pruned,
    write_model,
)
from helpers.tiny import tiny_model
from safetensors.torch import save_file

from converter.quantize.quantization import plan_quantization
from converter.quantize.schemes import SCHEMES, Wanted
from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.geometry import ModelGeometry

REFUSED = {
    "hidden size": (
        lambda: tiny_model("llama", 4, 4, 40, hidden_size=80),
        ["--scheme", "w4a16"],
        ["the hidden size 80 is no multiple of the group size 32; choose --group-size channel",
         "the hidden size 80 is no multiple of 32, which w4a16 needs; choose another --scheme (fp8-dynamic and"],
    ),
    "heads": (
        lambda: tiny_model("llama", 3, 3, 40, head_dim=16),
        ["--scheme", "w4a16", "--group-size", "channel"],
        ["layer 0: o_proj, whose inputs are 3 heads of 16 = 48, is no multiple of 32, which w4a16 needs",
         "layer 2: q, k and v, whose outputs are 3 heads of 16 and 3 KV heads = 144, is no multiple of 32"],
    ),
    "heads on ranks": (
        lambda: tiny_model("llama", 6, 6, 40, head_dim=16),
        ["--scheme", "w4a16", "--group-size", "channel", "--tensor-parallel-size", "2"],
        ["layer 0: o_proj, whose inputs are 6 heads of 16 on 2 ranks, so on one = 48, is no multiple of 32"],
    ),
    "group size": (
        lambda: tiny_model("llama", 6, 6, 40),
        ["--scheme", "w4a16", "--group-size", "64"],
        ["the hidden size 96 is no multiple of the group size 64; choose --group-size 32 or channel"],
    ),
    "a group that ends inside of a number": (
        lambda: tiny_model("llama", 6, 6, 40),
        ["--scheme", "w4a16", "--group-size", "12"],
        ["a group of 12 inputs does not fill int32 numbers of 8 each"],
    ),
    "groups of another scheme": (
        lambda: tiny_model("llama", 6, 6, 40),
        ["--scheme", "fp8-dynamic", "--group-size", "32"],
        ["--group-size is for w4a16; fp8-dynamic has a scale for each output"],
    ),
    "a part of q, k and v": (
        lambda: tiny_model("llama", 6, 6, 40),
        ["--scheme", "w8a16", "--ignore", "re:.*q_proj"],
        ["--ignore leaves model.layers.0.self_attn.q_proj as it is, but not model.layers.0.self_attn.k_proj"],
    ),
    "some experts": (
        lambda: tiny_model("qwen3_moe", 6, 3, 24),
        ["--scheme", "w8a16", "--ignore", "re:.*experts.3.*"],
        ["--ignore leaves model.layers.0.mlp.experts.3.gate_proj as it is, but not model.layers.0.mlp.experts.0.gate_"],
    ),
    "a name of nothing": (
        lambda: tiny_model("llama", 6, 6, 40),
        ["--scheme", "w8a16", "--ignore", "q_proj"],
        ["--ignore q_proj: no linear layer has such a name; the first is model.layers.0.self_attn.q_proj"],
    ),
    "no regular expression": (
        lambda: tiny_model("llama", 6, 6, 40),
        ["--scheme", "w8a16", "--ignore", "re:("],
        ["--ignore re:(: no regular expression"],
    ),
    "everything left alone": (
        lambda: tiny_model("llama", 6, 6, 40),
        ["--scheme", "w8a16", "--ignore", "re:.*"],
        ["There is no layer to quantize"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_kernel_takes_is_refused_before_anything_is_written(tmp_path, capsys, name):
    model, options, messages = REFUSED[name]
    model().save_pretrained(tmp_path / "out")
    check_refused(capsys, tmp_path, ["out"], tmp_path / "out", tmp_path / "quantized", *options, messages=messages)


def test_every_size_is_taken_where_nothing_is_packed(tmp_path):
    tiny_model("llama", 4, 4, 17, head_dim=6, hidden_size=20).save_pretrained(tmp_path / "out")
    for scheme in ("fp8-dynamic", "w8a8-int8"):
        assert quantize_pruned(tmp_path / "out", tmp_path / scheme, "--scheme", scheme) == 0


def not_finite(value: float):
    return lambda out: edit_weights(out, {"model.layers.1.mlp.up_proj.weight": torch.full((40, 96), value)})


BAD_INPUTS = {
    "nothing": (shutil.rmtree, "config.json is missing"),
    "no config.json": (lambda out: (out / "config.json").unlink(), "config.json is missing"),
    "no weights": (lambda out: (out / "model.safetensors").unlink(), "has neither model.safetensors nor"),
    "quantized": (
        lambda out: edit_json(out / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        "is quantized already (gptq); quantize the model that it was made from",
    ),
    "masks": (
        lambda out: save_file({"a": torch.ones(1)}, out / "pruning_masks.safetensors"),
        "holds masks that are not applied yet: convert-pruned",
    ),
    "tensor missing": (
        lambda out: edit_weights(out, {}, remove=("model.layers.2.mlp.up_proj.weight",)),
        "model.layers.2.mlp.up_proj.weight [40, 96]: missing",
    ),
    "another size": (lambda out: edit_json(out / "config.json", intermediate_size=41), "config.json says [41, 96]"),
    "what vLLM computes otherwise": (lambda out: edit_json(out / "config.json", hidden_act="gelu"), "hidden_act is"),
    "NaN": (not_finite(math.nan), "model.layers.1.mlp.up_proj.weight: 3840 values are NaN or infinite in F32; check"),
    "infinite": (not_finite(-math.inf), "up_proj.weight: 3840 values are NaN or infinite in F32; check the weights"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_refused_and_leaves_nothing(tmp_path, capsys, name):
    break_it, message = BAD_INPUTS[name]
    out = write_model(tmp_path, "dense")
    break_it(out)
    kept = sorted(path.name for path in tmp_path.iterdir())
    check_refused(capsys, tmp_path, kept, out, tmp_path / "quantized", "--scheme", "w4a16", messages=[message])


def test_what_it_wrote_itself_is_not_quantized_again(tmp_path, capsys):
    out = write_model(tmp_path, "ragged")
    assert quantize_pruned(out, tmp_path / "one", "--scheme", "fp8-dynamic") == 0
    args = [tmp_path / "one", tmp_path / "two", "--scheme", "w4a16"]
    check_refused(capsys, tmp_path, ["ckpt", "one", "out"], *args, messages=["is quantized already (fp8-dynamic)"])
    assert convert_pruned(tmp_path / "one", tmp_path / "two") == 2


def test_another_output_is_not_touched(tmp_path, capsys):
    out = write_model(tmp_path, "ragged")
    options = ["--scheme", "w8a8-int8"]
    check_refused(capsys, tmp_path, ["ckpt", "out"], out, out, *options, messages=["exists; choose another directory"])
    message = "was not written by this command, so it is not replaced"
    check_refused(capsys, tmp_path, ["ckpt", "out"], out, out, *options, "--overwrite", messages=[message])
    quantized = tmp_path / "quantized"
    assert quantize_pruned(out, quantized, *options) == 0
    (quantized / "notes.txt").write_text("mine")
    assert quantize_pruned(out, quantized, "--scheme", "fp8-dynamic", "--overwrite") == 0
    assert config_of(quantized)["quantization_config"]["format"] == "float-quantized"
    assert (quantized / "notes.txt").read_text() == "mine"
    out.rename(quantized / "inside")
    names = ["ckpt", "quantized"]
    messages = [f"{quantized} contains {quantized / 'inside'}"]
    check_refused(capsys, tmp_path, names, quantized / "inside", quantized, *options, "--overwrite", messages=messages)


def test_a_full_disk_leaves_nothing(tmp_path, capsys):
    out = write_model(tmp_path, "ragged")
    args = [out, tmp_path / "quantized", "--scheme", "w8a8-int8"]
    with files_of_at_most(10_000):
        check_refused(capsys, tmp_path, ["ckpt", "out"], *args, messages=["cannot write model.safetensors: File too"])


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    out = write_model(tmp_path, "experts")
    assert quantize_pruned(out, tmp_path / "quantized", "--scheme", "w4a16", "--dry-run") == 0
    assert "46+50" in capsys.readouterr().out and sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "out"]


def test_converting_refuses_what_quantizing_refuses(tmp_path, capsys):
    write_model(tmp_path, "ragged")
    capsys.readouterr()
    for options, message in (
        (["--quantize", "w4a16", "--group-size", "128"], "the hidden size 96 is no multiple of the group size 128"),
        (["--group-size", "channel", "--ignore", "lm_head"], "--group-size, --ignore: only with --quantize"),
    ):
        assert convert_pruned(tmp_path / "ckpt", tmp_path / "direct", *options) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "direct").exists()


def test_without_the_library_a_sentence_says_what_to_install(tmp_path, capsys, monkeypatch):
    out = write_model(tmp_path, "ragged")
    find_spec = importlib.util.find_spec
    gone = "compressed_tensors"
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *args: None if name == gone else find_spec(name, *args)
    )
    message = "pip install 'compressed-tensors>=0.17', or pruned-vllm[quantize]"
    args = [out, tmp_path / "quantized", "--scheme", "w4a16"]
    check_refused(capsys, tmp_path, ["ckpt", "out"], *args, messages=[message])
    assert convert_pruned(tmp_path / "ckpt", tmp_path / "quantized", "--quantize", "w4a16") == 2
    assert message in capsys.readouterr().err
    assert convert_pruned(tmp_path / "ckpt", tmp_path / "floats") == 0


def test_every_problem_of_every_layer_is_reported():
    model = tiny_model("llama", 5, 5, 40, head_dim=16, hidden_size=80)
    config = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    with pytest.raises(InputError) as raised:
        plan_quantization(Wanted(SCHEMES["w4a16"]), ModelGeometry.from_config(config))
    # The hidden size and o_proj of three layers for groups; for kernels the hidden size, o_proj, and q, k and v.
    assert len(raised.value.problems) == 4 + 7
