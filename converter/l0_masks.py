"""Masks learned by L0 regularisation, as CoFi and the projects that come from it save them.

zs.pt is a dictionary of masks z, saved by torch.save. Its keys, with L layers that have masks:

    head_z         [L, 1, num_attention_heads, 1, 1]   (Sheared LLaMA without the last axis)
    intermediate_z [L, 1, 1, intermediate_size]
    hidden_z       [hidden_size]
    head_layer_z, mlp_z [L], or layer_z for both        what they do differs: see the importers

0 removes a unit. Other values are at most 1 and seldom 1: they are to be folded in. l0_module.pt is the module that the
masks come from, pickled: it has log alpha of each mask, and says which layers have masks, where not all have. zs.pt may
hold None, or be absent; then the masks are computed from log alpha as the projects do (models/l0_module.py).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from converter.mask_values import not_finite
from converter.pickles import Stub, attributes
from converter.torch_files import is_torch_file, module_tensors, read_torch_file
from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.geometry import ModelGeometry

ZS_FILE, L0_FILE, LORA_FILE = "zs.pt", "l0_module.pt", "lora_weights.pt"
ZS_NAME = re.compile(r"zs(_s\d+)?\.pt")  # with the number of a step: Sheared LLaMA

# The axes of a mask that are no ones: layer and unit.
UNIT_AXES = {"head_z": (0, 2), "intermediate_z": (0, 3), "hidden_z": (0,)}
GATES = ("head_layer_z", "mlp_z", "layer_z")
UNSUPPORTED = ("qk_head_dim_z", "vo_head_dim_z")

# The parameters of l0_module.pt.
LOG_ALPHAS = {
    **{"head_z": "head_loga", "intermediate_z": "int_loga", "hidden_z": "hidden_loga"},
    **{"layer_z": "layer_loga", "head_layer_z": "headlayer_loga", "mlp_z": "intlayer_loga"},
}
# First layer with masks by (layers with masks, layers), where nothing says it: what Compresso's merge_weights.py takes.
KNOWN_RANGES = {(26, 32): 4, (28, 32): 3}

# The stretched concrete distribution of the masks.
LOWEST, HIGHEST, EPSILON, TEMPERATURE, SHARPNESS = -0.1, 1.1, 1e-6, 2 / 3, 0.8


@dataclass(frozen=True)
class L0Masks:
    """The masks of a model, float32.

    Attributes:
        file: where they are from.
        values: by key of zs.pt, less the axes of size one: [layers with masks, units], [layers with masks], or
            [hidden_size]. `layer_z` is there under the names of the two masks that it stands for.
        first_layer: the first layer that has masks; None where nothing says it.
    """

    file: Path
    values: dict[str, torch.Tensor]
    first_layer: int | None = None

    @property
    def hidden(self) -> torch.Tensor | None:
        """[hidden_size]"""
        return self.values.get("hidden_z")

    def of_layer(self, key: str, layer: int) -> torch.Tensor | None:
        """The mask of one layer; None where it has none. After `problems` found none."""
        masks, row = self.values.get(key), layer - (self.first_layer or 0)
        return masks[row] if masks is not None and 0 <= row < len(masks) else None

    def placed(self, dense: ModelGeometry) -> tuple["L0Masks", list[str]]:
        """The same with the first layer for a model of this geometry, and what does not fit it."""
        layers = dense.dense_layers
        units = {"head_z": layers[0].num_attention_heads, "intermediate_z": layers[0].intermediate_size}
        problems = [
            f"{self.file.name}: {key} is for {mask.shape[-1]:,} units, the model has {units[key]:,}"
            for key, mask in self.values.items()
            if key in units and mask.shape[-1] != units[key]
        ]
        if self.hidden is not None and len(self.hidden) != dense.hidden_size:
            problems.append(
                f"{self.file.name}: hidden_z is for {len(self.hidden):,} dimensions, the model has "
                f"{dense.hidden_size:,}"
            )
        for key, mask in self.values.items():
            if bad := not_finite(mask, name=key):
                problems.append(f"{self.file.name}: {bad}")
        rows = {key: len(mask) for key, mask in self.values.items() if key != "hidden_z"}
        if len(set(rows.values())) > 1:
            counts = ", ".join(f"{key} has {count}" for key, count in rows.items())
            return self, [*problems, f"{self.file.name}: the masks are for different numbers of layers: {counts}"]
        covered = next(iter(rows.values()), len(layers))
        first = self.first_layer
        if covered == len(layers):
            first = 0
        elif first is None:
            first = KNOWN_RANGES.get((covered, len(layers)))
        if first is None:
            problems.append(
                f"{self.file.name}: has masks for {covered} layers, the model has {len(layers)}; {L0_FILE}, which says "
                "for which ones, is not beside it"
            )
        elif not 0 <= first <= len(layers) - covered:
            problems.append(
                f"{self.file.name}: has masks for layers {first} to {first + covered - 1}, the model has {len(layers)}"
            )
        return L0Masks(self.file, self.values, first), problems


def mask_directory(path: Path) -> Path | None:
    """The directory of zs.pt or l0_module.pt, given itself or one of the two; None where there is neither."""
    if path.is_file():
        return path.parent if path.name in (ZS_FILE, L0_FILE) else None
    return path if any((path / name).is_file() for name in (ZS_FILE, L0_FILE)) else None


def recognised_masks(path: Path, head_rank: int) -> str | None:
    """What says that `path` holds masks whose head_z has this many axes; those without heads have any."""
    directory = mask_directory(path)
    file = path if directory is None else directory / ZS_FILE
    if not is_torch_file(file):
        return L0_FILE if directory is not None and (directory / L0_FILE).is_file() and head_rank == 5 else None
    if not ZS_NAME.fullmatch(file.name):
        return None
    zs = read_torch_file(file)
    if zs is None:
        return f"{ZS_FILE} without masks, beside {L0_FILE}" if head_rank == 5 else None
    if not isinstance(zs, dict) or not set(zs) & set(UNIT_AXES):
        return None
    head_z = zs.get("head_z")
    if isinstance(head_z, torch.Tensor) and head_z.dim() != head_rank:
        return None
    return f"{file.name} with {', '.join(key for key in (*UNIT_AXES, *GATES, *UNSUPPORTED) if key in zs)}"


def read_masks(directory: Path) -> L0Masks:
    """The masks in zs.pt, or computed from l0_module.pt. Raises InputError."""
    module = read_torch_file(directory / L0_FILE) if (directory / L0_FILE).is_file() else None
    zs = read_torch_file(directory / ZS_FILE) if (directory / ZS_FILE).is_file() else None
    start = attributes(module).get("block_layer_start")
    first = start if type(start) is int else None
    if zs is not None:
        return masks_from_zs(directory / ZS_FILE, zs, first)
    if not isinstance(module, Stub):
        raise InputError(
            f"{directory / ZS_FILE} holds no masks, and {L0_FILE}, from which they can be computed, is not beside it"
        )
    return masks_from_zs(directory / L0_FILE, _masks_of_module(directory / L0_FILE, module), first)


def masks_from_zs(file: Path, zs: Any, first_layer: int | None = None) -> L0Masks:
    """The content of zs.pt without axes of size one. Raises InputError with every key that is not as it should be."""
    if not isinstance(zs, dict):
        raise InputError(f"{file} holds no masks by name (head_z, intermediate_z, hidden_z)")
    values: dict[str, torch.Tensor] = {}
    problems = []
    for key, mask in zs.items():
        axes = UNIT_AXES.get(key) or ((0,) if key in GATES else None)
        if key in UNSUPPORTED:
            problems.append(f"{key}: masks inside of heads cannot be cut: vLLM serves heads of one size")
        elif axes is None or not isinstance(mask, torch.Tensor):
            problems.append(f"{key!s:.200}: unknown key; known: {', '.join((*UNIT_AXES, *GATES))}")
        elif mask.dim() <= axes[-1] or math.prod(mask.shape[axis] for axis in axes) != mask.numel():
            problems.append(f"{key}: shape {list(mask.shape)}; more than one entry along an axis that has no units")
        else:
            values[key] = mask.detach().reshape([mask.shape[axis] for axis in axes]).float()
    if not values and not problems:
        problems.append("it has no masks")
    if problems:
        raise InputError(f"The masks in {file} cannot be read:", problems)
    if (gates := values.pop("layer_z", None)) is not None:
        values |= {"head_layer_z": gates, "mlp_z": gates}
    return L0Masks(file, values, first_layer)


def mask_of_units(log_alpha: torch.Tensor, temperature: float = TEMPERATURE, zeros: int | None = None) -> torch.Tensor:
    """The mask of one row of units, as `_deterministic_z` of the projects computes it.

    Args:
        log_alpha: [units]
        zeros: how many are removed; None for the number that the distribution expects.
    """
    if zeros is None:
        zeros = _expected_zeros(log_alpha, temperature)
    mask = torch.sigmoid(log_alpha / temperature * SHARPNESS)
    mask[torch.topk(mask, k=zeros, largest=False).indices] = 0
    return mask


def _expected_zeros(log_alpha: torch.Tensor, temperature: float) -> int:
    zero = (0 - LOWEST) / (HIGHEST - LOWEST)
    closed = torch.sigmoid((math.log(zero) - math.log(1 - zero)) * temperature - log_alpha)
    opened = (1 - closed.clamp(EPSILON, 1 - EPSILON)).sum().item()
    return round(log_alpha.numel() - opened) if math.isfinite(opened) else 0


def _masks_of_module(file: Path, module: Stub) -> Mapping[str, torch.Tensor]:
    """What `forward(training=False)` of the module returns, with the axes of zs.pt. A gate is 0 or 1."""
    parameters = module_tensors(module)
    temperature = module.get("temperature", TEMPERATURE)
    if not isinstance(temperature, int | float) or not temperature > 0:
        raise InputError(f"{file}: temperature is {temperature!r:.80}; it must be a number above 0")
    zs = {}
    for key, name in LOG_ALPHAS.items():
        if (log_alpha := parameters.get(name)) is None:
            continue
        axes = 1 if key == "hidden_z" or key in GATES else 2
        if log_alpha.dim() != axes or not log_alpha.numel():
            raise InputError(f"{file}: {name} has shape {list(log_alpha.shape)}; it needs {axes} axes, none empty")
        log_alpha = log_alpha.float()
        if key in GATES:
            zs[key] = torch.tensor([float(not _expected_zeros(gate, temperature)) for gate in log_alpha])
        elif key == "hidden_z":
            zs[key] = mask_of_units(log_alpha, temperature)
        else:
            rows = torch.stack([mask_of_units(row, temperature) for row in log_alpha])
            shape = [1] * (UNIT_AXES[key][-1] + 1)
            shape[0], shape[-1] = rows.shape
            zs[key] = rows.reshape(shape)
    if not zs:
        raise InputError(f"{file} has none of the parameters {', '.join(LOG_ALPHAS.values())}")
    return zs
