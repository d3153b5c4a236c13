"""Quantized checkpoints as compressed-tensors lays them out, rounded to the nearest, and what they compute.

Written for the tests alone, from the layout in the documentation of compressed-tensors: the project's own quantizer and
its tables of names and shapes are what the tests judge.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from helpers.tiny import prompts
from safetensors.torch import load_file, save_file
from torch import nn

FP8 = torch.float8_e4m3fn
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
DYNAMIC = {"num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": True}
HEAD_AND_ROUTERS = ["lm_head", r"re:.*mlp\.gate$", r"re:.*shared_expert_gate$"]


@dataclass(frozen=True)
class Scheme:
    """How a checkpoint is quantized.

    Attributes:
        layout: `format` of quantization_config.
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
    def group_size(self) -> int | None:
        return self.weights.get("group_size")

    def config(self) -> dict[str, Any]:
        """quantization_config."""
        group = {"targets": ["Linear"], "weights": self.weights, "input_activations": self.inputs}
        return {
            "quant_method": "compressed-tensors",
            "format": self.layout,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group | {"output_activations": None}},
            "ignore": [*HEAD_AND_ROUTERS, *self.ignore],
            "kv_cache_scheme": None,
        }


def _weights(num_bits: int, number: str, group_size: int | None = None) -> dict[str, Any]:
    strategy = {"strategy": "channel"} if group_size is None else {"strategy": "group", "group_size": group_size}
    return {"num_bits": num_bits, "type": number, "symmetric": True, "dynamic": False} | strategy


SCHEMES = {
    "fp8-dynamic": Scheme("float-quantized", _weights(8, "float"), DYNAMIC | {"type": "float"}),
    "w8a8-int8": Scheme("int-quantized", _weights(8, "int"), DYNAMIC | {"type": "int"}),
    "w8a16": Scheme("pack-quantized", _weights(8, "int")),
    "w4a16": Scheme("pack-quantized", _weights(4, "int")),
    "w4a16 in groups of 32": Scheme("pack-quantized", _weights(4, "int", 32)),
}


@dataclass
class Written:
    """A quantized model on disk.

    Attributes:
        directory: the quantized checkpoint.
        widened: its weights in float32, unquantized, in a directory of their own.
    """

    directory: Path
    widened: Path
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


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
        numbers, scale = rounded(tensor.float(), scheme, largest)
        spread = scale.repeat_interleave(scheme.group_size or tensor.shape[1], dim=1)[:, : tensor.shape[1]]
        widened[name] = numbers.float() * spread
        stored = packed(numbers, scheme.num_bits) if scheme.layout == "pack-quantized" else {"weight": numbers}
        for key, value in (stored | {"weight_scale": scale}).items():
            tensors[f"{module}.{key}"] = value
    config = json.loads((source / "config.json").read_text())
    for directory, content, changes in (
        (target / "quantized", tensors, {"quantization_config": scheme.config()}),
        (target / "widened", widened, {}),
    ):
        shutil.copytree(source, directory)
        save_file({name: value.contiguous() for name, value in content.items()}, directory / "model.safetensors",
                  {"format": "pt"})  # fmt: skip
        (directory / "config.json").write_text(json.dumps(config | changes))
    return Written(target / "quantized", target / "widened", tensors)


def is_quantized(module: str, scheme: Scheme) -> bool:
    ignored = any(re.match(pattern.removeprefix("re:"), module) for pattern in scheme.ignore)
    return module.rpartition(".")[2] in PROJECTIONS and not ignored


def rounded(weight: torch.Tensor, scheme: Scheme, largest: int = 127) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest numbers and their scales [outputs, groups], symmetric, from the largest absolute value."""
    size = scheme.group_size or weight.shape[1]
    groups = -(-weight.shape[1] // size)
    padded = nn.functional.pad(weight, (0, groups * size - weight.shape[1])).view(len(weight), groups, size)
    most = 448 if scheme.is_float else min(largest, 2 ** (scheme.num_bits - 1) - 1)
    scale = (padded.abs().amax(-1, keepdim=True) / most).clamp_min(1e-8)
    numbers = (padded / scale).flatten(1)[:, : weight.shape[1]]
    return numbers.to(FP8) if scheme.is_float else numbers.round().to(torch.int8), scale[..., 0]


def widened(tensors: dict[str, torch.Tensor], scheme: Scheme, shape: tuple[int, int]) -> torch.Tensor:
    """The float32 weight that the tensors of one layer store."""
    if scheme.layout == "pack-quantized":
        places = torch.arange(0, 32, scheme.num_bits)
        words = tensors["weight_packed"].to(torch.int64) & 2**32 - 1
        numbers = (words[..., None] >> places & 2**scheme.num_bits - 1).flatten(1)[:, : shape[1]]
        numbers = numbers - 2 ** (scheme.num_bits - 1)
    else:
        numbers = tensors["weight"]
    spread = tensors["weight_scale"].repeat_interleave(scheme.group_size or shape[1], dim=1)[:, : shape[1]]
    return numbers.float() * spread


def packed(numbers: torch.Tensor, num_bits: int) -> dict[str, torch.Tensor]:
    """Several in an int32 along the inputs, the first in the lowest bits, from 0 on; what is left over is zeros."""
    factor = 32 // num_bits
    stored = numbers.to(torch.int64) + 2 ** (num_bits - 1)
    stored = nn.functional.pad(stored, (0, -stored.shape[1] % factor)).view(len(numbers), -1, factor)
    words = sum(stored[..., place] << (num_bits * place) for place in range(factor))
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    return {"weight_packed": words, "weight_shape": torch.tensor(numbers.shape)}


def quantize_inputs(x: torch.Tensor, is_float: bool, most: float) -> torch.Tensor:
    """Rounds each token's inputs as dynamic schemes do, in float32; `most` is what the largest one becomes."""
    scale = (x.float().abs().amax(-1, keepdim=True) / most).clamp_min(1e-12)
    numbers = x.float() / scale
    return (numbers.to(FP8).float() if is_float else numbers.round().clamp(-128, 127)) * scale


@contextmanager
def inputs_quantized(
    model: nn.Module, scheme: Scheme, experts: bool = False, most: float | None = None
) -> Iterator[None]:
    """While it lasts, the projections of `model` round their inputs.

    Args:
        experts: also those of experts, which vLLM leaves as they are on a CPU.
        most: what the largest of a token's int8 inputs becomes: 127 in vLLM, 127.5 in compressed-tensors.
    """

    def rounding(_, inputs: tuple) -> tuple:
        return (quantize_inputs(inputs[0], scheme.is_float, 448 if scheme.is_float else most or 127),)

    hooks = []
    if scheme.inputs is not None:
        for name, module in model.named_modules():
            projection = name.removesuffix(".base_layer")  # what PEFT makes of one
            if (
                isinstance(module, nn.Linear)
                and is_quantized(projection, scheme)
                and (experts or ".experts." not in name)
            ):
                hooks.append(module.register_forward_pre_hook(rounding))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def log_probabilities(model: nn.Module, tokens: list[int]) -> torch.Tensor:
    """[len(tokens) - 1, vocabulary], of what follows each token but the last."""
    return model(input_ids=torch.tensor([tokens])).logits[0, :-1].float().log_softmax(-1)


def differences(outputs: list, expected: Callable[[list[int]], torch.Tensor]) -> torch.Tensor:
    """|served log-probability - expected one| of every token that vLLM tells of, teacher-forced on what it served."""
    found = []
    for prompt, output in zip(prompts(), outputs, strict=True):
        reference = expected([*prompt, *output.outputs[0].token_ids])
        served = [*(output.prompt_logprobs or ())[1:], *output.outputs[0].logprobs]
        for position, logprobs in enumerate(served, len(reference) - len(served)):
            found += [abs(entry.logprob - reference[position, token].item()) for token, entry in logprobs.items()]
    return torch.tensor(found)


def emulated_differences(outputs: list, model: nn.Module, scheme: Scheme) -> torch.Tensor:
    """`differences` to the float32 emulation of the scheme by a Hugging Face model with its rounded weights."""
    with inputs_quantized(model, scheme):
        return differences(outputs, lambda tokens: log_probabilities(model, tokens))
