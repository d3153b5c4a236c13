"""NVIDIA Puzzletron, AnyModel and Nemotron-NAS: sizes of each layer in config.json (block_configs, per_layer_config).

Reads a model directory whose config.json has `block_configs` (DeciLM of both kinds, AnyModel), or `per_layer_config`
under a stock architecture, as Transformers writes it. The weights may be in subblocks_safetensors/, as the index says.
Query heads whose columns of o_proj are zero, since their KV head was pruned, go too. Refused by layer: linear and mamba
layers in place of attention, windows, parallel blocks, experts chosen by block.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converter.beside import companions_of, require_directory
from converter.block_configs import sizes_from_blocks
from converter.checkpoint import Checkpoint
from converter.cut_config import with_largest_layer
from converter.from_shapes import with_last_biases
from converter.importers import masked
from converter.source import Request, Source
from converter.zero_units import find_zero_units
from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.config import dense_geometry, read_config
from pruned_vllm.formats.config_values import shown
from pruned_vllm.formats.experts import NUM_EXPERTS
from pruned_vllm.formats.families import FAMILIES, find_family
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.headers import dense_problems, read_headers
from pruned_vllm.formats.layer import LayerGeometry

NAME = "Puzzletron"

_OURS = ("per_layer_config", "allow_global_per_layer_attribute_access")
# DeciLM computes what Llama does, where its blocks say nothing else. The tensors tell its biases: o_proj may have one
# where q, k and v have none.
_DECI_BIASES = ("attention_bias", "mlp_bias", "o_proj_bias")


def recognise(path: Path) -> str | None:
    if not (path / "config.json").is_file() or masked.recognise(path):
        return None
    config = read_config(path)
    return next((f"{key} in config.json" for key in ("block_configs", "per_layer_config") if config.get(key)), None)


def read(request: Request) -> Source:
    directory = require_directory(request.path)
    config = _stock(read_config(directory))
    if config.get("block_configs"):
        config, layers = sizes_from_blocks(config)
    else:
        config, layers = _sizes_from_overrides(config)
    weights = Checkpoint(directory, config, read_headers(directory))
    parent = dense_geometry(directory, weights.config)
    weights = weights.with_config(with_largest_layer(weights.config, parent, layers))
    dense = dense_geometry(directory, weights.config)
    geometry = dense.with_layers(layers)
    weights = with_last_biases(weights.without(_norms_of_nothing(geometry)), geometry)
    if problems := dense_problems(weights.tensors, geometry):
        raise InputError(f"The tensors in {directory} are not those that its config.json describes:", problems)
    kv_heads = parent.dense_layers[0].num_key_value_heads
    fewer = [index for index, layer in enumerate(layers) if 0 < layer.num_key_value_heads < kv_heads]
    units = find_zero_units(weights, geometry, {f"model.layers.{index}.self_attn.o_proj.weight" for index in fewer})
    companions = companions_of(request, directory)
    return Source(
        weights=weights,
        method="puzzletron",
        dense=dense,
        layers=layers,
        masks=units.masks,
        inputs=(directory, companions),
        companions=companions,
        notes=units.notes,
    )


def _stock(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json under the name of the stock architecture that computes the same. Raises InputError."""
    stock = dict(config)
    names = config.get("architectures") or []
    if config.get("model_type") == "nemotron-nas" or (names == ["DeciLMForCausalLM"] and config.get("block_configs")):
        stock = {key: value for key, value in stock.items() if key not in _DECI_BIASES}
        return stock | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    if names == ["AnyModel"]:
        base = stock.pop("base_architecture", None)
        families = [row for row in FAMILIES.values() if row.model_type == config.get("model_type")]
        families += [row for row in FAMILIES.values() if row.architecture == base]
        if not families:
            raise InputError(
                f"architectures {names} with base_architecture {shown(base)} and model_type "
                f"{shown(config.get('model_type'))} is not supported; supported: "
                f"{', '.join(row.architecture for row in FAMILIES.values())}"
            )
        stock |= {"model_type": families[0].model_type, "architectures": [families[0].architecture]}
        return {key: value for key, value in stock.items() if not key.startswith("anymodel_")}
    return stock


def _sizes_from_overrides(config: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[LayerGeometry, ...]]:
    """config.json without `per_layer_config`, and the layers that it describes. Raises InputError."""
    given = config.get("per_layer_config")
    if given is None:
        raise InputError(
            "config.json has neither block_configs nor per_layer_config, which say the sizes of the layers"
        )
    if not isinstance(given, Mapping) or not all(isinstance(sizes, Mapping | None) for sizes in given.values()):
        raise InputError(f"per_layer_config is {shown(given)}; it must map layer indices to sizes")
    overrides: dict[str, Mapping[str, Any]] = {index: sizes or {} for index, sizes in given.items()}
    experts = find_family(config).experts
    count_keys = experts.count_keys if experts is not None else ()
    stated = next((config[key] for key in count_keys if config.get(key) is not None), None)
    # What the family calls the number of experts becomes our key; Hugging Face has several names for some.
    kept = {
        index: {
            NUM_EXPERTS if key in count_keys else key: value
            for key, value in sizes.items()
            if key not in count_keys or value != stated
        }
        for index, sizes in overrides.items()
    }
    plain = {key: value for key, value in config.items() if key not in _OURS}
    width_key = experts.width_key if experts is not None else "intermediate_size"
    wanted = {key: key for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size", width_key)}
    if experts is not None and stated is None:
        wanted[NUM_EXPERTS] = count_keys[0]
    for key, top_level_key in wanted.items():
        sizes = [entry[key] for entry in kept.values() if isinstance(entry.get(key), int)]
        if plain.get(top_level_key) is None and sizes:  # every layer has its own
            plain[top_level_key] = max(sizes)
    return plain, ModelGeometry.from_config({**plain, "per_layer_config": kept}).layers


def _norms_of_nothing(geometry: ModelGeometry) -> list[str]:
    """Names of norms of sublayers that are gone."""
    return [
        f"model.layers.{index}.{norm}.weight"
        for index, layer in enumerate(geometry.layers)
        for sublayer in layer.skip
        for norm in geometry.family.norms_of(sublayer)
    ]
