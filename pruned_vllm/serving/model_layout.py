"""The sizes of the model that is served, and how its layers are spread over the tensor-parallel ranks."""

import functools
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.quantization import Quantization, WeightScheme
from pruned_vllm.formats.quantized_tensors import linear_scheme
from pruned_vllm.serving.sharding import LayerLayout, shard_layer

if TYPE_CHECKING:  # serving/config.py imports this file while the plugin registers, before vLLM may be set up
    from vllm.config import VllmConfig

CPU_PACKED_MULTIPLE = 32  # of inputs and outputs, in vLLM's kernel for packed weights on CPUs


@dataclass(frozen=True)
class ModelLayout:
    """A model on all ranks.

    Attributes:
        geometry: the sizes that config.json says.
        ranks: the tensor-parallel size.
        layers: the layout of each layer.
        quantization: how the checkpoint is quantized; None if it is not.
    """

    geometry: ModelGeometry
    ranks: int
    layers: tuple[LayerLayout, ...]
    quantization: Quantization | None = None

    @classmethod
    def from_geometry(
        cls,
        geometry: ModelGeometry,
        ranks: int,
        quantization: Quantization | None = None,
        packed_multiple: int = 1,
    ) -> "ModelLayout":
        """Lays out a model.

        Args:
            packed_multiple: what a kernel wants inputs and outputs of packed weights to be multiples of, on each rank.
        """
        shard = functools.cache(shard_layer)
        layers = []
        for index, layer in enumerate(geometry.layers):
            mlp = f"model.layers.{index}.{geometry.family.mlp_of(layer)}"
            layers.append(shard(layer, ranks, _channel_quantum(geometry, quantization, mlp, packed_multiple)))
        return cls(geometry, ranks, tuple(layers), quantization)


def model_layout(vllm_config: "VllmConfig") -> ModelLayout:
    """The layout of the model that `vllm_config` describes, read from its config.json once in a process.

    Raises:
        InputError: the config describes no valid model.
    """
    from vllm.platforms import current_platform

    config_json = vllm_config.model_config.hf_config.to_json_string(use_diff=False)
    multiple = CPU_PACKED_MULTIPLE if current_platform.is_cpu() else 1
    return _read_layout(config_json, vllm_config.parallel_config.tensor_parallel_size, multiple)


@functools.cache
def _read_layout(config_json: str, ranks: int, packed_multiple: int) -> ModelLayout:
    config = json.loads(config_json)
    geometry, quantization = ModelGeometry.from_config(config), Quantization.from_config(config)
    return ModelLayout.from_geometry(geometry, ranks, quantization, packed_multiple)


def _channel_quantum(geometry: ModelGeometry, quantization: Quantization | None, mlp: str, packed_multiple: int) -> int:
    """What the channels of an MLP on each rank must be a multiple of, so that no rank begins inside of what is stored
    together."""
    if quantization is None:
        return 1
    quantum = 1
    for projection in ("gate_proj", "up_proj", "down_proj"):
        scheme = linear_scheme(geometry, quantization, f"{mlp}.{projection}")
        if isinstance(scheme, WeightScheme):
            units = (scheme.pack_factor, scheme.group_size or 1, *(scheme.block_size or ()))
            quantum = math.lcm(quantum, *units, packed_multiple if scheme.layout == "packed" else 1)
    return quantum
