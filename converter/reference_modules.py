"""The parts of a model that have weights, in float32: linear layers and norms by the names of their tensors."""

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.family import Family

PART_NUMBERS = 1 << 24  # of a weight that are in float32 at the same time


@dataclass(frozen=True)
class ReferenceModules:
    """Computes with the tensors of a model.

    Attributes:
        family, config: of the model.
        read, rounding: as in `ReferenceModel`.
    """

    family: Family
    config: Mapping[str, Any]
    read: Callable[[str], torch.Tensor | None]
    rounding: torch.dtype | None

    def rms_norm(
        self, name: str, values: torch.Tensor, squares: torch.Tensor | None = None, epsilon: float | None = None
    ) -> torch.Tensor:
        """RMSNorm of the last dimension.

        Args:
            name: of the norm.
            squares: what the mean of the squares is taken to be; None: what it is.
            epsilon: None is that of config.json.
        """
        if squares is None:
            squares = values.square().mean(-1, keepdim=True)
        weight = self.rounded(self.weight(name).float(), name)
        if self.family.norms_add_one:
            weight = 1 + weight
        if epsilon is None:
            epsilon = self.family.with_defaults(self.config).get("rms_norm_eps", 1e-6)
        return values * torch.rsqrt(squares + epsilon) * weight

    def linear(self, module: str, values: torch.Tensor) -> torch.Tensor:
        """[tokens, in] -> [tokens, out]"""
        outputs = [values @ part.T for part in self._parts(module)]
        return torch.cat(outputs, dim=1) + self.bias(module)

    def _parts(self, module: str) -> Iterator[torch.Tensor]:
        """Rows of a weight in float32, a few at a time."""
        weight = self.weight(module)
        for number, part in enumerate(weight.split(max(1, PART_NUMBERS // weight.shape[1]))):
            yield self.rounded(part.float(), f"{module}.weight {number}")

    def weight(self, module: str) -> torch.Tensor:
        """A module's weight, as it is stored."""
        return self.tensor(f"{module}.weight")

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor as it is stored. Raises InputError where there is none."""
        tensor = self.read(name)
        if tensor is None:
            raise InputError(f"{name} is missing; the model cannot be run without it")
        return tensor

    def bias(self, module: str) -> torch.Tensor:
        """A module's bias, or zero."""
        bias = self.read(f"{module}.bias")
        return torch.zeros(()) if bias is None else self.rounded(bias.float(), f"{module}.bias")

    def rounded(self, values: torch.Tensor, seed: str) -> torch.Tensor:
        """float32 values, off by what `rounding` says."""
        if self.rounding is None:
            return values
        generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
        factors = 0.5 + torch.rand(len(values), *[1] * (values.dim() - 1), generator=generator) / 2
        return (values * factors).to(self.rounding).float() / factors
