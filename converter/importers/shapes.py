"""Tensors that were cut already, whatever config.json says: FLAP, wanda-sp, GradNAS, Torch-Pruning, cuts by hand.

Reads a model directory with safetensors or pytorch_model.bin, or a file that holds a state dict of torch.save, with
config.json beside it or in --base-model. Every layer's sizes are those of its tensors; head_dim is the one of
config.json, else hidden_size / num_attention_heads of the model before pruning. Biases of o_proj and down_proj stay,
also where nothing else of a sublayer is left. Sublayers without tensors, or with tensors without rows, are gone.
"""

from dataclasses import replace
from pathlib import Path

from converter.checkpoint import Checkpoint
from converter.from_shapes import layers_from_shapes
from converter.importers import masked
from converter.source import Request, Source
from converter.state_dicts import read_weights, recognise_state_dict, refuse_two_formats
from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.config import dense_geometry
from pruned_vllm.formats.masked import LayerMasks
from pruned_vllm.formats.weights import has_weight_files

NAME = "tensors that are cut already"

# Lists that some projects write beside the tensors. The tensors say the same, and config.json must not say it twice.
SIZE_LISTS = ("layer_head_num", "layer_inter_size", "layer_num")


def recognise(path: Path) -> str | None:
    if masked.recognise(path):
        return None
    if (path / "config.json").is_file() and has_weight_files(path):
        return "config.json beside weights"
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
    config = {key: value for key, value in weights.config.items() if key not in SIZE_LISTS}
    dense = dense_geometry(weights.directory, config)
    found = layers_from_shapes(weights.tensors, dense)
    if found.problems:
        raise InputError(f"The tensors in {request.path} contradict each other:", found.problems)
    return Source(
        weights=weights.with_config(config).without(found.leftovers),
        method=method,
        dense=dense,
        layers=tuple(found.layers),
        masks=[LayerMasks()] * len(dense.layers),
        inputs=(request.path,),
        companions=weights.directory,
    )
