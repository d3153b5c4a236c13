"""Models to quantize, quantized files widened by the library that defines them, and rounding written out once more."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from helpers.masked import RAGGED, convert_pruned
from helpers.tiny import expert_masks, masks_for, tiny_model, write_masked
from safetensors.torch import load_file

from converter.quantize import command

PARTS = ("weight_packed", "weight_scale", "weight_shape")
LARGEST_FP8 = 448


def quantize_pruned(*args) -> int:
    """Runs the command; returns its exit code."""
    return command.main([str(arg) for arg in args])


def check_refused(capsys, directory: Path, kept: list[str], *args, messages: list[str]) -> None:
    """The command refuses these arguments with these messages, and leaves what was in the directory."""
    assert quantize_pruned(*args) == 2
    error = capsys.readouterr().err
    assert "quantize-pruned: " in error and all(message in error for message in messages), error
    assert sorted(path.name for path in directory.iterdir()) == kept


def write_model(directory: Path, name: str) -> Path:
    """The model of GEOMETRIES of that name: converted without padding, or a stock one."""
    model, masks = GEOMETRIES[name]()
    if masks is None:
        model.save_pretrained(directory / "out")
    else:
        write_masked(directory / "ckpt", model, masks)
        assert convert_pruned(directory / "ckpt", directory / "out") == 0
    return directory / "out"


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def config_of(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())


def widened(directory: Path) -> tuple[dict[str, torch.Tensor], set[str]]:
    """All tensors of a quantized model, its weights in float32 as the library reads them; names of the latter."""
    config = QuantizationConfig.model_validate(config_of(directory)["quantization_config"])
    scheme, stored = config.config_groups["group_0"], tensors_of(directory)
    compressor = BaseCompressor.get_value_from_registry(config.format)
    found, names = {}, set()
    for scale_name in [name for name in stored if name.endswith(".weight_scale")]:
        module = scale_name.removesuffix(".weight_scale")
        names.add(f"{module}.weight")
        parts = {part: stored.pop(f"{module}.{part}") for part in (*PARTS, "weight") if f"{module}.{part}" in stored}
        parts["weight_scale"] = parts["weight_scale"].float()
        found[f"{module}.weight"] = compressor.decompress(parts, scheme)["weight"]
    return stored | found, names


def nearest(weight: torch.Tensor, scheme: str, group_size: int | None) -> torch.Tensor:
    """`weight` [rows, columns] rounded to the nearest value, in float32; scales have the dtype of the weight."""
    num_bits = 4 if scheme == "w4a16" else 8
    steps = LARGEST_FP8 if scheme == "fp8-dynamic" else (2**num_bits - 1) / 2
    groups = weight.float().view(len(weight), -1, group_size or weight.shape[1])
    scale = (groups.abs().amax(-1, keepdim=True) / steps).to(weight.dtype).float()
    values = groups / torch.where(scale == 0, 1, scale)
    if scheme == "fp8-dynamic":
        values = values.clamp(-LARGEST_FP8, LARGEST_FP8).to(torch.float8_e4m3fn).float()
    else:
        values = values.round().clamp(-(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1)
    return (values * scale).view(weight.shape)


def padded(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """`tensor` with zeros behind it."""
    result = torch.zeros(shape, dtype=tensor.dtype)
    result[tuple(slice(size) for size in tensor.shape)] = tensor
    return result


UNEVEN = [[1, 1, 0, 1, 0, 0, 1, 0, 1, 0, 0, 1], [0] * 4 + [1] * 8, [1] * 12]
GONE = [[0] * 6, [1, 1, 1, 1, 0, 0], [1] * 6]
WIDTHS = [torch.arange(40) < width for width in (37, 0, 12)]
EXPERTS = [[17, 0, 24, 5], [0, 0, 0, 0], [1, 2, 3, 4]]


def _with_experts(model_type: str, **config) -> tuple:
    model = tiny_model(model_type, 6, 3, 24, **config).bfloat16()
    return model, expert_masks(model, EXPERTS)


# name -> the model and its masks; None: it stays dense
GEOMETRIES: dict[str, Callable[[], tuple]] = {
    "dense": lambda: (tiny_model("llama", 6, 6, 40), None),
    "ragged": lambda: (tiny_model("llama", 6, 6, 40).bfloat16(), RAGGED),
    "uneven groups": lambda: (tiny_model("llama", 12, 3, 40), masks_for(UNEVEN, WIDTHS[:1])),
    "sublayers gone, biases": lambda: (
        tiny_model("llama", 6, 6, 40, attention_bias=True, mlp_bias=True),
        masks_for(GONE, WIDTHS),
    ),
    "Qwen2, tied": lambda: (tiny_model("qwen2", 6, 6, 40, tie_word_embeddings=True).bfloat16(), RAGGED),
    "float16": lambda: (tiny_model("mistral", 6, 3, 40).half(), None),
    "experts": lambda: _with_experts("qwen3_moe"),
    "Mixtral": lambda: _with_experts("mixtral"),
    "equal experts": lambda: (tiny_model("qwen3_moe", 6, 3, 24).bfloat16(), None),
    "shared experts": lambda: _with_experts("qwen2_moe"),
    "gpt-oss": lambda: _with_experts("gpt_oss"),
    "DeepSeek": lambda: _with_experts("deepseek", moe_intermediate_size=32),
}
