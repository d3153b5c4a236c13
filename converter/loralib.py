"""LoRA weights in the format of loralib: lora_weights.pt of Compresso, LoRaPruner and NutePrune.

A dictionary, saved by torch.save, with `model.layers.{i}.self_attn.q_proj.lora_A` [rank, in] and `.lora_B` [out, rank]:
the names of the modules, without ".weight". W + alpha / rank * B @ A is what the layer computes with. Alpha is not in
the file. The projects' scripts train with rank 8 and alpha 8; so alpha is taken for the rank unless the user says it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from converter.checkpoint import DTYPES
from converter.mask_values import not_finite
from converter.torch_files import read_torch_file
from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.geometry import ModelGeometry

KEY = re.compile(r"(module\.)*(?P<module>.+)\.lora_(?P<half>[AB])")


@dataclass(frozen=True)
class LoralibWeights:
    """What is added to weights, and by which factor.

    Attributes:
        file: where it was read from.
        pairs: lora_A [rank, in] and lora_B [out, rank] by full name of the weight that they change.
        alpha: None for the rank of each pair, a scale of 1.
    """

    file: Path
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]
    alpha: float | None

    @property
    def names(self) -> set[str]:
        """Full names of the weights that change."""
        return set(self.pairs)

    def merge(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The sum in float32 (float64 for float64): the caller casts, once, after the masks are folded in."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        a, b = (half.to(dtype) for half in self.pairs[name])
        return torch.addmm(weight.to(dtype), b, a, alpha=1 if self.alpha is None else self.alpha / len(a))

    def describe(self) -> str:
        ranks = sorted({len(a) for a, _ in self.pairs.values()})
        unknown = "the file does not say alpha, so it was taken for the rank; give another with --lora-alpha"
        scale = unknown if self.alpha is None else f"alpha {self.alpha:g}"
        return (
            f"{self.file.name}: LoRA of rank {' and '.join(map(str, ranks))}, merged into {len(self.pairs):,} weights "
            f"before the masks were folded in ({scale})."
        )


def read_loralib(file: Path, dense: ModelGeometry, alpha: float | None) -> LoralibWeights:
    """Reads lora_weights.pt for a dense model of this geometry.

    Args:
        alpha: of the training; None for the rank.

    Raises:
        InputError: with every tensor that is unknown, lacks its other half, or has a wrong shape or no finite numbers.
    """
    content = read_torch_file(file)
    if not isinstance(content, dict):
        raise InputError(f"{file} holds no LoRA weights by name; give what the project saved")
    shapes = dense.tensor_shapes()
    halves, problems = _halves(content, dense)
    pairs = {}
    for name, found in halves.items():
        if missing := {"A", "B"} - set(found):
            problems.append(f"{name}: lora_{missing.pop()} is missing; save the LoRA weights again")
            continue
        a, b = found["A"], found["B"]
        out, width = shapes[name]
        if a.dim() != 2 or b.dim() != 2 or (len(b), a.shape[1]) != (out, width) or len(a) != b.shape[1]:
            problems.append(
                f"{name} [{out}, {width}]: lora_A has shape {list(a.shape)} and lora_B {list(b.shape)}; they need "
                f"[rank, {width}] and [{out}, rank]"
            )
        elif bad := not_finite(a, b):
            problems.append(f"{name}: {bad}")
        elif len(a):
            pairs[name] = a, b
    if problems:
        raise InputError(f"The LoRA weights in {file} cannot be merged:", problems)
    return LoralibWeights(file, pairs, alpha)


def _halves(content: Mapping[Any, Any], dense: ModelGeometry) -> tuple[dict[str, dict[str, torch.Tensor]], list[str]]:
    """The tensors "A" and "B" of each weight by its full name, and problems with all else."""
    linear = {name for name, shape in dense.tensor_shapes().items() if len(shape) == 2}
    linear -= {"model.embed_tokens.weight"}  # LoRA of an embedding is transposed, and these projects have none
    halves: dict[str, dict[str, torch.Tensor]] = {}
    problems = []
    for key, tensor in content.items():
        match = KEY.fullmatch(str(key))
        name = f"{match['module']}.weight" if match else ""
        if match is None or name not in linear or not isinstance(tensor, torch.Tensor):
            problems.append(f"{key!s:.200}: not a LoRA weight of a linear layer of {dense.family.architecture}")
        elif tensor.dtype not in DTYPES:
            problems.append(f"{key!s:.200}: {tensor.dtype}; only floats can be merged")
        elif match["half"] in halves.setdefault(name, {}):
            problems.append(f"{key!s:.200}: there twice, with and without 'module.' before its name; keep one")
        else:
            halves[name][match["half"]] = tensor
    return halves, problems
