"""A converted model whose experts are whole or gone, in the form in which vLLM 0.33 itself serves MoNE's constants.

config.json is that of a stock model, and `approximate_experts` lists the experts of each layer that are constants, each
with a tensor `experts.{number}.approx_value`; an expert that outputs zeros is a constant of zeros. The router stays as
it is (arXiv 2507.00390; vllm/model_executor/models/expert_substitution.py). What `--from mone` reads again.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from converter.checkpoint import Checkpoint
from converter.convert import WRITER
from converter.writer import lay_out, shard_file, write_index
from pruned_vllm.common.directories import atomic_directory
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import write_json
from pruned_vllm.common.progress import progress_bar
from pruned_vllm.formats.companions import copy_companions
from pruned_vllm.formats.config import converted_config, read_config
from pruned_vllm.formats.experts import CONSTANT_EXPERTS, NUM_EXPERTS, SHARED_WIDTH
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.headers import dense_problems
from pruned_vllm.formats.masked import MASKS_FILE

CONSTANTS = "approximate_experts"
MAX_SHARD_BYTES = 5_000_000_000
# Keys of a converted config.json that a stock one lacks, unless the family has one of that name.
OURS = {"per_layer_config", "allow_global_per_layer_attribute_access", "pruning", "query_heads_per_kv_head"}
OURS |= {"expert_intermediate_sizes", CONSTANT_EXPERTS, NUM_EXPERTS, SHARED_WIDTH}


def export_mone(directory: Path, target: Path) -> int:
    """Writes a converted model to the directory `target`, which appears whole or not at all.

    Returns:
        how many experts are constants.

    Raises:
        InputError: anything but whole experts is gone, the model is quantized, or `target` exists.
        OSError: the disk cannot be written.
    """
    if (directory / MASKS_FILE).exists():
        raise InputError(f"{directory} holds masks; convert it first, then export what that writes")
    config = read_config(directory)
    if "quantization_config" in config:
        raise InputError(f"{directory} is quantized, which vLLM does not serve with constants; export float weights")
    geometry, checkpoint = ModelGeometry.from_config(config), Checkpoint.from_directory(directory)
    if problems := dense_problems(checkpoint.tensors, geometry):
        raise InputError(f"The tensors in {directory} do not fit its config.json:", problems)
    gone = [
        [expert for expert, width in enumerate(layer.expert_intermediate_sizes) if not width]
        for layer in geometry.layers
    ]
    stock = _stock_config(directory, geometry, config)
    checkpoint = _with_constants(checkpoint, geometry, gone)
    listed = {str(index): experts for index, experts in enumerate(gone) if experts}
    with atomic_directory(target, writer=WRITER, overwrite=False) as temporary:
        _write(checkpoint, temporary)
        write_json(temporary / "config.json", stock | {CONSTANTS: listed})
        copy_companions(directory, temporary)
    return sum(map(len, gone))


def _stock_config(directory: Path, geometry: ModelGeometry, config: dict) -> dict:
    """config.json of the model with all its experts. Raises InputError where more is gone than whole experts."""
    if geometry.experts is None:
        raise InputError(f"{directory}: {geometry.family.architecture} has no experts that could be constants")
    if geometry.family.experts_format.bias:
        raise InputError(f"{directory}: the experts of {geometry.family.architecture} have biases, which MoNE lacks")
    whole = [
        replace(layer, expert_intermediate_sizes=dense.expert_intermediate_sizes, constant_experts=())
        for layer, dense in zip(geometry.layers, geometry.dense_layers, strict=True)
    ]
    problems = list(_problems(geometry))
    names = geometry.family.experts_format
    ours = OURS - {*names.count_keys, names.shared_width_key}
    plain = {key: value for key, value in config.items() if key not in ours}
    stock = converted_config(geometry.with_layers(tuple(whole)), plain)
    if not problems and "per_layer_config" in stock:
        problems = [
            "heads, dense MLPs or shared experts are not of one size, or vLLM's own class computes another model"
        ]
    if problems:
        raise InputError(
            f"{directory} lost more than whole experts, so vLLM needs the plugin; serve it as it is:", problems
        )
    return stock


def _problems(geometry: ModelGeometry) -> Iterator[str]:
    for index, (layer, dense) in enumerate(zip(geometry.layers, geometry.dense_layers, strict=True)):
        widths, width = layer.expert_intermediate_sizes, dense.expert_width
        if len(widths) != len(dense.expert_intermediate_sizes):
            yield f"layer {index}: the router has {len(widths)} rows of {len(dense.expert_intermediate_sizes)}"
        elif narrow := [expert for expert, channels in enumerate(widths) if channels not in (0, width)]:
            kept = widths[narrow[0]]
            yield f"layer {index}: expert {narrow[0]} has {kept} channels of {width}; it must have all or none"


def _with_constants(checkpoint: Checkpoint, geometry: ModelGeometry, gone: list[list[int]]) -> Checkpoint:
    """`checkpoint` with a constant of each expert that is gone, under MoNE's names."""
    names, biases, zeros = geometry.family.experts_format, [], {}
    norm = checkpoint.tensors["model.norm.weight"]  # as long as a constant
    for index, experts in enumerate(gone):
        for expert in experts:
            down = f"model.layers.{index}.{names.modules_of(expert)[2]}"
            constant = f"{down.rpartition('.')[0]}.approx_value"
            if expert in geometry.layers[index].constant_experts:
                checkpoint = checkpoint.with_copy(constant, f"{down}.bias")
                biases.append(f"{down}.bias")
            else:
                zeros[constant] = replace(norm, key=constant, span=(0, 0), is_zeros=True)
    left = checkpoint.without(biases)
    return Checkpoint(checkpoint.directory, checkpoint.config, {**left.tensors, **zeros})


def _write(checkpoint: Checkpoint, directory: Path) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in checkpoint.tensors.items()}
    dtypes = {name: tensor.dtype for name, tensor in checkpoint.tensors.items()}
    shards = lay_out(shapes, dtypes, MAX_SHARD_BYTES)
    with progress_bar(total=len(shapes), desc="writing", unit=" tensors") as progress:
        for shard in shards:
            with shard_file(directory, shard) as file:
                for name, place in shard.places.items():
                    content = checkpoint.read(name).contiguous().view(torch.uint8).numpy().data
                    file.write(content, place)
                    progress.update()
    write_index(directory, shards)
