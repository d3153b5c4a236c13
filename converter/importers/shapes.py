"""Tensors that were cut already, whatever config.json says: FLAP, wanda-sp, GradNAS, Torch-Pruning, cuts by hand.

Reads a model directory with safetensors or pytorch_model.bin, or a file that holds a state dict of torch.save, with
config.json beside it or in --base-model. Every layer's sizes are those of its tensors; head_dim is the one of
--base-model, else of config.json, else hidden_size / num_attention_heads of config.json. Biases of o_proj and down_proj
stay, also where nothing else of a sublayer is left. Sublayers without tensors, or with tensors without rows, are gone.
"""

from dataclasses import replace
from pathlib import Path

from converter.base_model import CONFIG_FILES, find_base_model
from converter.beside import companions_of
from converter.checkpoint import Checkpoint
from converter.cut_config import shared_config, size_list_problems, with_largest_layer
from converter.from_shapes import layers_from_shapes, shapes_differ, too_many_heads, with_last_biases
from converter.source import Request, Source
from converter.state_dicts import read_weights, recognise_state_dict, refuse_two_formats
from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.config import dense_geometry, read_config
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.masked import LayerMasks
from pruned_vllm.formats.weights import has_weight_files

NAME = "tensors that are cut already"


def recognise(path: Path) -> str | None:
    if (differ := shapes_differ(path)) is not None:
        return "tensors of other shapes than config.json says" if differ else None
    return recognise_state_dict(path)


def read(request: Request) -> Source:
    if request.path.is_dir() and has_weight_files(request.path):
        refuse_two_formats(request.path)
        return source_from_shapes(Checkpoint.from_directory(request.path), request, "shapes")
    weights, notes = read_weights(request)
    source = source_from_shapes(weights, request, "shapes")
    return replace(source, notes=(*source.notes, *notes))


def source_from_shapes(weights: Checkpoint, request: Request, method: str) -> Source:
    """What the shapes of these tensors say. Raises InputError where they contradict each other."""
    base = None
    if request.base_model is not None:
        base = read_config(find_base_model(request, "no config.json of it", CONFIG_FILES)[0])
    config, notes = shared_config(weights, base)
    stated = dense_geometry(weights.directory, config)
    found = layers_from_shapes(weights.tensors, stated)
    problems = found.problems
    if not problems:
        problems = size_list_problems(weights.config, found.layers)
        if base is None and weights.config.get("head_dim") is None and stated.family.default_head_dim is None:
            problems += too_many_heads(found.layers, stated)
    if problems:
        raise InputError(f"The tensors in {request.path} contradict each other, or its config.json:", problems)
    shared, config = config, with_largest_layer(config, stated, found.layers)
    said = {key: value for key, value in weights.config.items() if shared.get(key) not in (None, value)}
    weights = weights.with_config(config).without(found.leftovers)
    dense = dense_geometry(weights.directory, weights.config)
    companions = companions_of(request, weights.directory)
    return Source(
        weights=with_last_biases(weights, dense.with_layers(tuple(found.layers))),
        method=method,
        dense=dense,
        before=ModelGeometry.from_config({**config, **said} if base is None else base),
        layers=tuple(found.layers),
        masks=[LayerMasks()] * len(dense.layers),
        inputs=(request.path, companions),
        companions=companions,
        notes=tuple(notes),
    )
