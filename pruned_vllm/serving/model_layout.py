"""The sizes of the model that is served, and how its layers are spread over the tensor-parallel ranks."""

import functools
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.serving.sharding import LayerLayout, shard_layer

if TYPE_CHECKING:  # serving/config.py imports this file while the plugin registers, before vLLM may be set up
    from vllm.config import VllmConfig


@dataclass(frozen=True)
class ModelLayout:
    """A model on all ranks.

    Attributes:
        geometry: the sizes that config.json says.
        ranks: the tensor-parallel size.
        layers: the layout of each layer.
    """

    geometry: ModelGeometry
    ranks: int
    layers: tuple[LayerLayout, ...]

    @classmethod
    def from_geometry(cls, geometry: ModelGeometry, ranks: int) -> "ModelLayout":
        layouts = {layer: shard_layer(layer, ranks) for layer in set(geometry.layers)}
        return cls(geometry, ranks, tuple(layouts[layer] for layer in geometry.layers))


def model_layout(vllm_config: "VllmConfig") -> ModelLayout:
    """The layout of the model that `vllm_config` describes, read from its config.json once in a process.

    Raises:
        InputError: the config describes no valid model.
    """
    config_json = vllm_config.model_config.hf_config.to_json_string(use_diff=False)
    return _read_layout(config_json, vllm_config.parallel_config.tensor_parallel_size)


@functools.cache
def _read_layout(config_json: str, ranks: int) -> ModelLayout:
    return ModelLayout.from_geometry(ModelGeometry.from_config(json.loads(config_json)), ranks)
