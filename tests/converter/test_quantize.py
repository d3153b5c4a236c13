"""quantize-pruned: weights become the nearest values, all else stays, and what no kernel takes is refused."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers.masked import convert_pruned
from helpers.quantized import (
    GEOMETRIES,
    config_of,
    nearest,
    padded,
    quantize_pruned,
    tensors_of,
    widened,
    write_model,
)
from helpers.tiny import byte_tokenizer, expert_masks, prompts, tiny_model, write_masked
from safetensors.torch import load_file, save_file

from converter import blocks
from converter.convert import convert
from converter.quantize.converted import plan_of_converted
from converter.quantize.schemes import SCHEMES, Wanted
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.hf.loading import load_pruned

ERRORS = {"fp8-dynamic": 0.03, "w8a8-int8": 0.01, "w8a16": 0.01, "w4a16": 0.13}  # relative rms of normal weights
MULTIPLES = {"fp8-dynamic": 16, "w8a8-int8": 32, "w8a16": 64, "w4a16": 64}
KEPT = ("mlp.gate", "block_sparse_moe.gate", "mlp.router", "shared_expert_gate")  # routers and gates of shared experts


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_weights_are_the_nearest_values_and_the_rest_stays(tmp_path, capsys, name, scheme):
    out = write_model(tmp_path, name)
    before = tensors_of(out)
    assert quantize_pruned(out, tmp_path / "quantized", "--scheme", scheme) == 0
    config = config_of(tmp_path / "quantized")
    weights = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    assert weights["group_size"] == (32 if scheme == "w4a16" else None), "32 divides the hidden size, 64 does not"
    shapes = ModelGeometry.from_config(config).tensor_shapes()
    after, quantized = widened(tmp_path / "quantized")
    assert after.keys() == before.keys() == shapes.keys()
    assert quantized == {
        tensor
        for tensor, shape in shapes.items()
        if len(shape) == 2 and ".layers." in tensor and not tensor.endswith(tuple(f"{kept}.weight" for kept in KEPT))
    }
    for tensor, values in before.items():
        values = padded(values, shapes[tensor])
        if tensor not in quantized:
            assert torch.equal(after[tensor], values) and after[tensor].dtype == values.dtype, tensor
            continue
        expected = nearest(values, scheme, weights["group_size"])
        torch.testing.assert_close(
            after[tensor], expected, rtol=1e-6, atol=0, msg=lambda text, tensor=tensor: f"{tensor}: {text}"
        )
        error = (after[tensor] - values.float()).norm() / values.float().norm()
        assert error < ERRORS[scheme], f"{tensor}: relative error {error}"
    printed = capsys.readouterr().out
    assert f"quantized to {scheme}" in printed and "q_proj: relative rms error" in printed


@pytest.mark.parametrize("scheme", SCHEMES)
def test_scales_have_the_dtype_and_the_shape_that_vllm_reads(tmp_path, scheme):
    out = write_model(tmp_path, "ragged")
    assert quantize_pruned(out, tmp_path / "quantized", "--scheme", scheme) == 0
    tensors = tensors_of(tmp_path / "quantized")
    found = {name.rpartition(".")[2]: tensors[name] for name in tensors if ".0.mlp.down_proj." in name}
    rows, width = 96, math.ceil(17 / MULTIPLES[scheme]) * MULTIPLES[scheme]
    groups = {"weight_scale": ((rows, width // 32 if scheme == "w4a16" else 1), torch.bfloat16)}
    stored = {
        "fp8-dynamic": {"weight": ((rows, width), torch.float8_e4m3fn)},
        "w8a8-int8": {"weight": ((rows, width), torch.int8)},
        "w8a16": {"weight_packed": ((rows, width // 4), torch.int32), "weight_shape": ((2,), torch.int64)},
        "w4a16": {"weight_packed": ((rows, width // 8), torch.int32), "weight_shape": ((2,), torch.int64)},
    }
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in found.items()} == stored[scheme] | groups
    if "weight_shape" in found:
        assert found["weight_shape"].tolist() == [rows, width]


@pytest.mark.parametrize("name", ["dense", "experts", "shared experts"])
def test_config_says_how_it_is_quantized_and_keeps_the_rest(tmp_path, name):
    out = write_model(tmp_path, name)
    assert quantize_pruned(out, tmp_path / "quantized", "--scheme", "w8a8-int8", "--ignore", "re:.*o_proj") == 0
    before, after, tensors = config_of(out), config_of(tmp_path / "quantized"), tensors_of(tmp_path / "quantized")
    quantization = after.pop("quantization_config")
    assert quantization["quant_method"] == "compressed-tensors" and quantization["format"] == "int-quantized"
    assert quantization["quantization_status"] == "compressed"
    kept = [tensor.removesuffix(".weight") for tensor in tensors if tensor.endswith((".gate.weight", "_gate.weight"))]
    assert set(quantization["ignore"]) == {"lm_head", "re:.*o_proj", *kept}
    assert quantization["ignore"][0] == "lm_head" and len(kept) == {"dense": 0, "experts": 3, "shared experts": 6}[name]
    changed = {"dense": {"intermediate_size"}, "experts": set(), "shared experts": {"per_layer_config"}}
    assert {key for key in before | after if before.get(key) != after.get(key)} == changed[name]
    assert all(tensors[f"{tensor}_scale"] is not None for tensor in tensors if tensor.endswith("v_proj.weight"))
    assert not [tensor for tensor in tensors if tensor.endswith("o_proj.weight_scale")]


UNCHANGED = [(17, 0, 24, 5), (0, 0, 0, 0), (1, 2, 3, 4)]
WIDE = {
    "dense": ("--scheme w8a8-int8 --tensor-parallel-size 3", {"intermediate_size": [96, 96, 96]}),
    "dense, groups": ("--scheme w4a16 --tensor-parallel-size 3", {"intermediate_size": [192, 192, 192]}),
    "equal experts": ("--scheme fp8-dynamic --tensor-parallel-size 3", {"experts": [(48, 48, 48, 48)] * 3}),
    "experts": ("--scheme w8a8-int8 --tensor-parallel-size 3", {"experts": UNCHANGED}),
    "experts, groups": ("--scheme w4a16", {"experts": [(32, 0, 32, 32), (0, 0, 0, 0), (64, 64, 64, 64)]}),
    "experts, a scale for each output": ("--scheme w4a16 --group-size channel", {"experts": UNCHANGED}),
    "shared experts": ("--scheme fp8-dynamic --tensor-parallel-size 2", {"intermediate_size": [32, 32, 32]}),
    "shared experts, left alone": (
        "--scheme fp8-dynamic --ignore re:.*shared_expert.*",
        {"intermediate_size": [20, 20, 20]},
    ),
}


@pytest.mark.parametrize("name", WIDE)
def test_widths_are_what_kernels_want_on_so_many_ranks(tmp_path, name):
    options, expected = WIDE[name]
    out = write_model(tmp_path, name.partition(",")[0])
    assert quantize_pruned(out, tmp_path / "quantized", *options.split()) == 0
    geometry = ModelGeometry.from_config(config_of(tmp_path / "quantized"))
    found = {
        "intermediate_size": [layer.intermediate_size for layer in geometry.layers],
        "experts": [layer.expert_intermediate_sizes for layer in geometry.layers],
    }
    assert {key: found[key] for key in expected} == expected


GROUPS = {
    "128 where it fits": (lambda: tiny_model("llama", 4, 4, 256, hidden_size=128), None, 128),
    "what all heads fit": (lambda: tiny_model("llama", 6, 6, 256, hidden_size=192), None, 64),
    "small groups for narrow experts": (
        lambda: tiny_model("qwen3_moe", 4, 4, 24, hidden_size=128),
        [[17, 0, 24, 5], [20, 3, 3, 3], [1, 2, 3, 4]],
        32,
    ),
}


@pytest.mark.parametrize("name", GROUPS)
def test_groups_are_those_that_make_the_smallest_files(tmp_path, name):
    make, widths, expected = GROUPS[name]
    model = make().bfloat16()
    write_masked(tmp_path / "ckpt", model, expert_masks(model, widths) if widths else {})
    assert convert_pruned(tmp_path / "ckpt", tmp_path / "out") == 0
    sizes = {}
    for size in (None, 128, 64, 32):
        options = ["--scheme", "w4a16", "--no-verify", *(["--group-size", size] if size else [])]
        if quantize_pruned(tmp_path / "out", tmp_path / f"{size}", *options) == 0:
            sizes[size] = (tmp_path / f"{size}" / "model.safetensors").stat().st_size
    config = config_of(tmp_path / "None")["quantization_config"]["config_groups"]["group_0"]
    assert config["weights"]["group_size"] == expected
    assert sizes[None] == min(sizes.values())


def test_the_cost_of_padding_is_printed(tmp_path, capsys):
    out = write_model(tmp_path, "ragged")
    assert quantize_pruned(out, tmp_path / "wide", "--scheme", "w8a8-int8", "--tensor-parallel-size", "2") == 0
    printed = capsys.readouterr().out
    wide = sum(tensor.nbytes for tensor in tensors_of(tmp_path / "wide").values())
    rows = 64 - 17 + 64 - 1 + 64 - 20  # of gate and up: int8 and a scale of two bytes; of down int8 alone
    zeros = rows * (3 * 96 + 2 * 2)
    assert f"Padding: {zeros / 1e6:,.3g} MB of zeros ({zeros / (wide - zeros):.1%})" in printed
    assert "kernels for w8a8-int8 on 2 ranks want widths in multiples of 64" in printed
    assert f"{wide:,} bytes" in printed and f"{wide:,} bytes" in (tmp_path / "wide" / "README.md").read_text()
    assert "2 ranks do not share the heads of 1 layers evenly" in printed


def logits(directory: Path, weights: dict[str, torch.Tensor], copy: Path) -> torch.Tensor:
    """Of the model in `directory` with these weights, in float32."""
    shutil.copytree(directory, copy)
    config = {key: value for key, value in config_of(directory).items() if key != "quantization_config"}
    (copy / "config.json").write_text(json.dumps(config))
    floats = {name: tensor.float().contiguous() for name, tensor in weights.items()}
    save_file(floats, copy / "model.safetensors", {"format": "pt"})
    with torch.no_grad():
        return load_pruned(copy, dtype=torch.float32, experts_implementation="eager")(
            torch.tensor(prompts()[-1:])
        ).logits


PADDED = [("sublayers gone, biases", "w8a8-int8"), ("shared experts", "fp8-dynamic")]
PADDED += [(name, "w4a16") for name in ("sublayers gone, biases", "experts", "equal experts", "shared experts")]


@pytest.mark.parametrize(("name", "scheme"), PADDED)
def test_padding_changes_no_output(tmp_path, name, scheme):
    out = write_model(tmp_path, name)
    assert quantize_pruned(out, tmp_path / "quantized", "--scheme", scheme) == 0
    after, quantized = widened(tmp_path / "quantized")
    rounded = {}
    for tensor, values in tensors_of(out).items():
        if tensor in quantized:  # scales are for whole groups, of which there may be less than one before
            whole = padded(values, (len(values), math.ceil(values.shape[1] / 32) * 32))
            values = nearest(whole, scheme, 32 if scheme == "w4a16" else None)[:, : values.shape[1]]
        rounded[tensor] = values
    assert any(after[tensor].shape != rounded[tensor].shape for tensor in after)
    found = logits(tmp_path / "quantized", after, tmp_path / "after")
    torch.testing.assert_close(found, logits(out, rounded, tmp_path / "before"), rtol=1e-4, atol=1e-4)


def test_companions_go_along_and_a_card_is_written(tmp_path):
    out = write_model(tmp_path, "ragged")
    byte_tokenizer().save_pretrained(out)
    assert quantize_pruned(out, tmp_path / "quantized", "--scheme", "w4a16") == 0
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "quantized" / name).read_bytes() == (out / name).read_bytes()
    card = (tmp_path / "quantized" / "README.md").read_text()
    size = sum(tensor.nbytes for tensor in tensors_of(tmp_path / "quantized").values())
    assert "- w4a16" in card and f"{size:,} bytes" in card and "over the same model before" in card
    (bits,) = re.findall(r"(4\.\d+) bits", card)
    assert 4.5 <= float(bits) < 4.55, "4, 16 for the scale of 32 weights, and the shape"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["ragged", "experts", "shared experts"])
def test_both_in_one_go_are_the_same_bytes(tmp_path, name, scheme):
    out = write_model(tmp_path, name)
    assert quantize_pruned(out, tmp_path / "quantized", "--scheme", scheme) == 0
    assert convert_pruned(tmp_path / "ckpt", tmp_path / "direct", "--quantize", scheme) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "direct", "out", "quantized"]
    for path in (tmp_path / "quantized").glob("[a-z]*.*"):
        assert path.read_bytes() == (tmp_path / "direct" / path.name).read_bytes(), path.name
    assert scheme in (tmp_path / "direct" / "README.md").read_text()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_same_bytes_whatever_the_threads_and_the_blocks(tmp_path, monkeypatch, scheme):
    plan = plan_of_converted(write_model(tmp_path, "experts"), Wanted(SCHEMES[scheme]))
    written = []
    for number, (threads, block_bytes) in enumerate([(1, 1 << 22), (5, 8000), (2, 1)]):
        monkeypatch.setattr(blocks, "BLOCK_BYTES", block_bytes)
        out = tmp_path / f"out{number}"
        convert(plan, out, max_shard_bytes=60_000, threads=threads)
        written.append({path.name: path.read_bytes() for path in out.glob("*.safetensors*")})
        for path in out.glob("*.safetensors"):
            save_file(load_file(path), tmp_path / "again", metadata={"format": "pt"})
            assert path.read_bytes() == (tmp_path / "again").read_bytes(), f"{path.name} is not what the library writes"
    assert len(written[0]) > 2 and written[0] == written[1] == written[2]


def test_masks_and_rounding_fit_together_where_experts_lose_channels(tmp_path):
    """Masks multiply first, and the product is rounded."""
    model = tiny_model("qwen3_moe", 6, 3, 24)
    masks = expert_masks(model, [[17, 3, 24, 5]] * 3)
    write_masked(tmp_path / "ckpt", model, masks)
    assert convert_pruned(tmp_path / "ckpt", tmp_path / "direct", "--quantize", "w8a8-int8") == 0
    after, _ = widened(tmp_path / "direct")
    mask = masks["model.layers.0.mlp.experts.channel_mask"][1]
    up = model.state_dict()["model.layers.0.mlp.experts.gate_up_proj"][1, 24:][mask != 0] * mask[mask != 0][:, None]
    expected = nearest(up, "w8a8-int8", None)
    torch.testing.assert_close(after["model.layers.0.mlp.experts.1.up_proj.weight"], expected, rtol=1e-6, atol=0)
