"""MoNE: constants in place of experts, in either of the two forms that vLLM 0.33 reads.

Reads a model directory with safetensors whose config.json lists experts by layer under `approximate_experts`, each with
a constant `experts.{number}.approx_value`, or under `expert_substitution` in compression_config.transform_config, which
names the constants. The router stays: a token that is sent to such an expert gets the constant times the router's
weight.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from converter.beside import companions_of, require_directory
from converter.checkpoint import Checkpoint
from converter.source import Request, Source
from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.config import dense_geometry, read_config
from pruned_vllm.formats.config_values import LARGEST_COUNT, shown
from pruned_vllm.formats.families import FAMILIES
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.headers import read_headers
from pruned_vllm.formats.masked import LayerMasks

NAME = "MoNE"

_LISTED, _DECLARED = "approximate_experts", "expert_substitution"
_OLD_SUFFIX = "_compressed"  # of the model types that MoNE's own code registers: olmoe_compressed
# What the declaration must say of the router; vLLM 0.33 refuses anything else (fused_moe/expert_substitution.py).
_ROUTER = {
    "preserve_logical_expert_ids": True,
    "preserve_router_weights": True,
    "renormalize_after_substitution": False,
}

Constants = dict[tuple[int, int], str | None]  # by layer and expert, the tensor's name; None where it follows from them


def recognise(path: Path) -> str | None:
    if not (path / "config.json").is_file():
        return None
    config = read_config(path)
    if config.get(_LISTED):
        return f"{_LISTED} in config.json"
    return f"{_DECLARED} in config.json" if _declared(config) else None


def read(request: Request) -> Source:
    directory = require_directory(request.path)
    given = read_config(directory)
    constants, config = _constants(given), _stock(given)
    dense = dense_geometry(directory, config)
    if dense.experts is None:
        raise InputError(f"{directory}: {dense.family.architecture} has no experts that could be constants")
    weights = Checkpoint(directory, config, read_headers(directory))
    weights = _with_biases(directory, weights, constants, dense)
    layers = []
    for index, layer in enumerate(dense.layers):
        of_layer = sorted(expert for number, expert in constants if number == index)
        sizes = enumerate(layer.expert_intermediate_sizes)
        widths = tuple(0 if expert in of_layer else width for expert, width in sizes)
        layers.append(replace(layer, expert_intermediate_sizes=widths, constant_experts=tuple(of_layer)))
    companions = companions_of(request, directory)
    return Source(
        weights=weights,
        method="mone",
        dense=dense,
        layers=tuple(layers),
        masks=[LayerMasks()] * len(layers),
        inputs=(directory, companions),
        companions=companions,
    )


def _stock(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json as it was before experts were replaced."""
    stock = {
        key: value for key, value in config.items() if not key.startswith(("approximate_expert", "llmcompressor_"))
    }
    compression = config.get("compression_config")
    if isinstance(compression, Mapping) and not compression.get("config_groups"):  # else weights are quantized
        stock.pop("compression_config")
    model_type = str(config.get("model_type"))
    if model_type.endswith(_OLD_SUFFIX) and (family := FAMILIES.get(model_type.removesuffix(_OLD_SUFFIX))):
        stock |= {"model_type": family.model_type, "architectures": [family.architecture]}
    return stock


def _declared(config: Mapping[str, Any]) -> Any:
    compression = config.get("compression_config")
    transforms = compression.get("transform_config") if isinstance(compression, Mapping) else None
    return transforms.get(_DECLARED) if isinstance(transforms, Mapping) else None


def _constants(config: Mapping[str, Any]) -> Constants:
    """The experts that config.json replaces. Raises InputError where it says so twice, or not as vLLM reads it."""
    listed, declared = config.get(_LISTED), _declared(config)
    if listed and declared:
        raise InputError(f"config.json has both {_LISTED} and {_DECLARED}; remove the one that does not count")
    found: Constants = {}
    try:
        entries = list(_listed_entries(listed) if listed else _declared_entries(declared))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        key = _LISTED if listed else _DECLARED
        raise InputError(f"config.json: {key} is not what vLLM 0.33 reads: {error!r:.200}") from None
    for layer, expert, name in entries:
        if (layer, expert) in found:
            raise InputError(f"config.json replaces expert {expert} of layer {layer} twice")
        found[layer, expert] = name
    if not found:
        raise InputError(f"config.json has no {_LISTED} and no {_DECLARED}, so no expert is a constant")
    return found


def _listed_entries(listed: Mapping[str, Any]) -> Iterator[tuple[int, int, None]]:
    for layer, experts in listed.items():
        yield from ((_index(layer), _index(expert), None) for expert in experts or ())


def _declared_entries(declared: Mapping[str, Any]) -> Iterator[tuple[int, int, str]]:
    if declared["version"] != 1 or declared["router_semantics"] != _ROUTER:
        raise ValueError("version must be 1, and routing unchanged")
    for path, target in declared["targets"].items():
        numbers = [part for part in path.split(".") if part.isdigit()]
        if len(numbers) != 1 or target["weight_layout"] != "compact_retained_experts":
            raise ValueError(f"target {shown(path)} must be the experts of one layer, stored one by one")
        for expert, replacement in target["replacements"].items():
            if replacement["format"] != "constant-v1":
                raise ValueError(f"expert {shown(expert)} of {shown(path)} is no constant")
            yield _index(numbers[0]), _index(expert), str(replacement["tensors"]["value"])


def _index(value: Any) -> int:
    number = int(value) if isinstance(value, str) and len(value) < 10 else value
    if type(number) is not int or not 0 <= number < LARGEST_COUNT:
        raise ValueError(f"{shown(value)} is no number of a layer or an expert")
    return number


def _with_biases(directory: Path, weights: Checkpoint, constants: Constants, dense: ModelGeometry) -> Checkpoint:
    """`weights` with the constants as biases of down projections. Raises InputError with all that are wrong."""
    problems, names = [], []
    for (layer, expert), name in constants.items():
        experts = dense.layers[layer].expert_intermediate_sizes if layer < len(dense.layers) else ()
        if expert >= len(experts):
            problems.append(f"layer {layer} has no expert {expert}, which config.json replaces")
            continue
        down = f"model.layers.{layer}.{dense.family.experts_format.modules_of(expert)[2]}"
        names.append(name or f"{down.rpartition('.')[0]}.approx_value")
        if names[-1] not in weights.tensors:
            problems.append(f"{names[-1]}: missing, the constant of expert {expert} of layer {layer}")
            continue
        weights = weights.with_copy(f"{down}.bias", names[-1])
    if problems:
        raise InputError(f"The constants in {directory} are not those of its config.json:", problems)
    return weights.without(names)
