"""What compressed-tensors does for quantize-pruned: scales, rounding, packing, and what config.json says of them.

vLLM brings the library; without vLLM it is the extra `quantize` (see `require_library`). Weights are rounded in float32
to the nearest value, with the scales as they are stored: so it does no harm that scales are rounded to 16 bits.
"""

from collections.abc import Mapping
from typing import Any

import compressed_tensors
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.utils import calculate_qparams

from converter.quantize.quantization import Quantization
from converter.quantize.schemes import Scheme


class Rounding:
    """Rounds the weights of a model and widens them again.

    Args:
        scheme, group_size: as in `Quantization`.
    """

    def __init__(self, scheme: Scheme, group_size: int | None) -> None:
        self._scheme = library_scheme(scheme, group_size)
        self._weights = _weight_arguments(scheme, group_size)
        self._compressor = BaseCompressor.get_value_from_registry(scheme.format)

    def round(self, weight: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The stored tensors of some rows of a weight, by what is added to the weight's name: "", "_scale" ...

        Args:
            weight: [rows, columns] of floats, all finite.
            dtype: of the scales.
        """
        weight = weight.float()
        scales = self.scales(weight).to(dtype)
        scales = torch.where(scales == 0, torch.finfo(dtype).tiny, scales)  # rows too small for float16 become zeros
        stored = self._compressor.compress({"weight": weight, "weight_scale": scales.float()}, self._scheme)
        return {name.removeprefix("weight"): tensor for name, tensor in {**stored, "weight_scale": scales}.items()}

    def widen(self, stored: Mapping[str, torch.Tensor], columns: int) -> torch.Tensor:
        """The weights [rows, columns] in float32 that `round` stored."""
        tensors = {f"weight{suffix}": tensor for suffix, tensor in stored.items()}
        scales = tensors["weight_scale"].float()
        shape = torch.tensor([len(scales), columns])
        given = {**tensors, "weight_scale": scales, "weight_shape": shape}
        return self._compressor.decompress(given, self._scheme)["weight"]

    def scales(self, weight: torch.Tensor) -> torch.Tensor:
        """The exact scales [rows, groups] of a float32 weight, one group where a scale is for an output."""
        groups = weight.unflatten(1, (-1, self._weights.group_size or weight.shape[1]))
        least, most = groups.amin(-1), groups.amax(-1)
        return calculate_qparams(least, most, self._weights)[0]


def library_scheme(scheme: Scheme, group_size: int | None) -> QuantizationScheme:
    """The scheme in compressed-tensors' words, for all linear layers."""
    preset = preset_name_to_scheme(scheme.preset, ["Linear"])
    return QuantizationScheme(
        targets=preset.targets,
        weights=_weight_arguments(scheme, group_size),
        input_activations=preset.input_activations,
        format=CompressionFormat(scheme.format),
    )


def _weight_arguments(scheme: Scheme, group_size: int | None) -> QuantizationArgs:
    """Those of the preset, with another group size. All presets are symmetric."""
    strategy = {"strategy": "group", "group_size": group_size} if group_size else {"strategy": "channel"}
    return QuantizationArgs(num_bits=scheme.num_bits, type=scheme.kind, symmetric=True, dynamic=False, **strategy)


def library_config(quantization: Quantization) -> dict[str, Any]:
    """`quantization_config` of config.json, as llm-compressor writes it."""
    config = QuantizationConfig(
        config_groups={"group_0": library_scheme(quantization.scheme, quantization.group_size)},
        format=quantization.scheme.format,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=list(quantization.ignore),
    )
    return {"version": compressed_tensors.__version__, **config.model_dump(mode="json")}
