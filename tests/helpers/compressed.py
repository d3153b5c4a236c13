"""Quantized checkpoints in the formats of compressed-tensors, GPTQ and AWQ; emulation.py has what they compute.

Rounded to the nearest. Written for the tests alone, from the layouts that those projects document: the project's own
quantizer and its tables of names and shapes are what the tests judge.
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

FP8 = torch.float8_e4m3fn
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
HEAD_AND_ROUTERS = ["lm_head", r"re:.*mlp\.(gate|router)$", r"re:.*shared_expert_gate$"]
INPUT_SCALE = 0.03  # of stored scales: inputs beyond 3.8 are cut off
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # which weight lies in each place of an int32


@dataclass(frozen=True)
class Scheme:
    """How a checkpoint is quantized.

    Attributes:
        layout: `format` of a quantization_config of compressed-tensors, or "gptq" or "awq".
        weights, inputs: as in its config_groups; inputs None for those that are not quantized.
        ignore: patterns of layers that stay plain, besides lm_head and routers.
    """

    layout: str
    weights: dict[str, Any]
    inputs: dict[str, Any] | None = None
    ignore: tuple[str, ...] = ()

    @property
    def num_bits(self) -> int:
        return self.weights["num_bits"]

    @property
    def is_float(self) -> bool:
        return self.weights["type"] == "float"

    @property
    def is_symmetric(self) -> bool:
        return self.weights["symmetric"]

    @property
    def is_static(self) -> bool:
        return self.inputs is not None and not self.inputs["dynamic"]

    @property
    def group_size(self) -> int | None:
        return self.weights.get("group_size")

    def config(self) -> dict[str, Any]:
        """quantization_config."""
        if self.layout == "gptq":
            sizes = {"bits": self.num_bits, "group_size": self.group_size, "desc_act": False, "sym": True}
            return {"quant_method": "gptq", **sizes}
        if self.layout == "awq":
            sizes = {"bits": self.num_bits, "group_size": self.group_size, "zero_point": True, "version": "gemm"}
            return {"quant_method": "awq", **sizes}
        group = {"targets": ["Linear"], "weights": self.weights, "input_activations": self.inputs}
        return {
            "quant_method": "compressed-tensors",
            "format": self.layout,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group | {"output_activations": None}},
            "ignore": [*HEAD_AND_ROUTERS, *self.ignore],
            "kv_cache_scheme": None,
        }


def _weights(num_bits: int, number: str, group_size: int | None = None, symmetric: bool = True) -> dict[str, Any]:
    strategy = {"strategy": "channel"} if group_size is None else {"strategy": "group", "group_size": group_size}
    return {"num_bits": num_bits, "type": number, "symmetric": symmetric, "dynamic": False} | strategy


def _inputs(number: str, dynamic: bool = True) -> dict[str, Any]:
    strategy = "token" if dynamic else "tensor"
    return {"num_bits": 8, "type": number, "strategy": strategy, "dynamic": dynamic, "symmetric": True}


SCHEMES = {
    "fp8-dynamic": Scheme("float-quantized", _weights(8, "float"), _inputs("float")),
    "w8a8-int8": Scheme("int-quantized", _weights(8, "int"), _inputs("int")),
    "w8a8-int8 with stored scales of inputs": Scheme("int-quantized", _weights(8, "int"), _inputs("int", False)),
    "w8a16": Scheme("pack-quantized", _weights(8, "int")),
    "w4a16": Scheme("pack-quantized", _weights(4, "int")),
    "w4a16 in groups of 32": Scheme("pack-quantized", _weights(4, "int", 32)),
    "w4a16 with zero points": Scheme("pack-quantized", _weights(4, "int", 32, symmetric=False)),
    "gptq": Scheme("gptq", _weights(4, "int", 32)),
    "awq": Scheme("awq", _weights(4, "int", 32, symmetric=False)),
}
COMPRESSED = {name: scheme for name, scheme in SCHEMES.items() if scheme.layout.endswith("quantized")}


@dataclass(frozen=True)
class Written:
    """A quantized model on disk: the checkpoint, and its weights in float32 in a directory of their own."""

    directory: Path
    widened: Path


def to_bfloat16(directory: Path) -> Path:
    """Rounds the weights of a model of one file to bfloat16, so that every dtype of an engine has the same."""
    (path,) = directory.glob("*.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    return directory


def write_quantized(source: Path, target: Path, scheme: Scheme, largest: int = 127) -> Written:
    """Quantizes the projections of a model of one file.

    Args:
        largest: absolute value of int8 weights; 63 where a CPU without VNNI would saturate.
    """
    tensors, widened = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        module, _, part = name.rpartition(".")
        if part != "weight" or not is_quantized(module, scheme):
            tensors[name] = widened[name] = tensor
            continue
        rounded = round_weight(tensor.float(), scheme, largest)
        widened[name] = rounded.widened()
        tensors |= {f"{module}.{key}": value for key, value in store(rounded, scheme).items()}
    config = json.loads((source / "config.json").read_text())
    for directory, content, changes in (
        (target / "quantized", tensors, {"quantization_config": scheme.config()}),
        (target / "widened", widened, {}),
    ):
        shutil.copytree(source, directory)
        content = {name: value.contiguous() for name, value in content.items()}
        save_file(content, directory / "model.safetensors", {"format": "pt"})
        (directory / "config.json").write_text(json.dumps(config | changes))
    return Written(target / "quantized", target / "widened")


def is_quantized(module: str, scheme: Scheme) -> bool:
    ignored = any(re.match(pattern.removeprefix("re:"), module) for pattern in scheme.ignore)
    return module.rpartition(".")[2] in PROJECTIONS and not ignored


@dataclass(frozen=True)
class Rounded:
    """A weight is (numbers - zeros) * scale; zeros and scale are [outputs, groups], numbers from -2^(bits - 1) on."""

    numbers: torch.Tensor
    scale: torch.Tensor
    zeros: torch.Tensor
    group_size: int

    def widened(self) -> torch.Tensor:
        """In float32 [outputs, inputs]."""
        inputs = self.numbers.shape[1]
        scale, zeros = (about.repeat_interleave(self.group_size, 1)[:, :inputs] for about in (self.scale, self.zeros))
        return (self.numbers.float() - zeros) * scale.float()


def round_weight(weight: torch.Tensor, scheme: Scheme, largest: int = 127) -> Rounded:
    """To the nearest numbers; the largest absolute value, or the range with zero points, decides on the scale."""
    outputs, inputs = weight.shape
    size = scheme.group_size or inputs
    groups = -(-inputs // size)
    padded = nn.functional.pad(weight, (0, groups * size - inputs)).view(outputs, groups, size)
    half = 2 ** (scheme.num_bits - 1)
    if scheme.is_symmetric:
        most = 448 if scheme.is_float else min(largest, half - 1)
        scale = (padded.abs().amax(-1) / most).clamp_min(1e-8)
        zeros = torch.zeros(outputs, groups)
    else:
        low, high = padded.amin(-1).clamp(max=0), padded.amax(-1).clamp(min=0)
        scale = ((high - low) / (2 * half - 1)).clamp_min(1e-8)
        zeros = (-low / scale).round() - half
    if scheme.layout in ("gptq", "awq"):
        scale = scale.half().float()
    numbers = (padded / scale[..., None]).flatten(1)[:, :inputs]
    if scheme.is_float:
        return Rounded(numbers.to(FP8), scale, zeros, size)
    numbers = numbers.round() + zeros.repeat_interleave(size, 1)[:, :inputs]
    return Rounded(numbers.clamp(-half, half - 1).to(torch.int8), scale, zeros, size)


def store(rounded: Rounded, scheme: Scheme) -> dict[str, torch.Tensor]:
    """The tensors of a layer."""
    numbers, zeros, bits = rounded.numbers, rounded.zeros.to(torch.int8), scheme.num_bits
    if scheme.layout == "gptq":
        # One less than the zero point is stored. The order of inputs says that nothing was reordered.
        order = torch.arange(numbers.shape[1], dtype=torch.int32) // scheme.group_size
        parts = {"qweight": pack(numbers.T, bits, dim=0), "qzeros": pack(zeros.T - 1, bits), "g_idx": order}
        return parts | {"scales": rounded.scale.T.half()}
    if scheme.layout == "awq":
        missing = -len(numbers) % 8
        order = torch.arange(len(numbers) + missing).view(-1, 8)[:, AWQ_ORDER].flatten()
        numbers, zeros = (nn.functional.pad(about, (0, 0, 0, missing))[order] for about in (numbers, zeros))
        return {"qweight": pack(numbers.T, bits), "qzeros": pack(zeros.T, bits), "scales": rounded.scale.T.half()}
    parts = {"weight_scale": rounded.scale}
    if scheme.layout == "pack-quantized":
        parts |= {"weight_packed": pack(numbers, bits), "weight_shape": torch.tensor(numbers.shape)}
        if not scheme.is_symmetric:
            parts["weight_zero_point"] = pack(zeros, bits, dim=0)
    else:
        parts["weight"] = numbers
    if scheme.is_static:
        parts["input_scale"] = torch.tensor([INPUT_SCALE])
    return parts


def read(parts: dict[str, torch.Tensor], scheme: Scheme, shape: tuple[int, int]) -> torch.Tensor:
    """The float32 weight that the tensors of a layer store in a format of compressed-tensors."""
    numbers, zeros = parts.get("weight"), torch.zeros(parts["weight_scale"].shape)
    if scheme.layout == "pack-quantized":
        numbers = unpack(parts["weight_packed"], scheme.num_bits)[:, : shape[1]]
        if not scheme.is_symmetric:
            zeros = unpack(parts["weight_zero_point"].T, scheme.num_bits).T[: shape[0]]
    inputs, size = shape[1], scheme.group_size or shape[1]
    scale, zeros = (about.repeat_interleave(size, 1)[:, :inputs] for about in (parts["weight_scale"], zeros))
    return (numbers.float() - zeros) * scale.float()


def pack(numbers: torch.Tensor, num_bits: int, dim: int = 1) -> torch.Tensor:
    """Several in an int32, the first in the lowest bits, from 0 on; what is left over is zeros."""
    if dim == 0:
        return pack(numbers.T, num_bits).T
    factor = 32 // num_bits
    stored = numbers.to(torch.int64) + 2 ** (num_bits - 1)
    stored = nn.functional.pad(stored, (0, -stored.shape[1] % factor)).view(len(numbers), -1, factor)
    words = sum(stored[..., place] << (num_bits * place) for place in range(factor))
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack(words: torch.Tensor, num_bits: int) -> torch.Tensor:
    """int32 [rows, columns] -> [rows, 32 / bits * columns]"""
    places = torch.arange(0, 32, num_bits)
    return (words.to(torch.int64)[..., None] >> places & 2**num_bits - 1).flatten(1) - 2 ** (num_bits - 1)
