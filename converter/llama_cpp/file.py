"""Writes a GGUF file, tensor after tensor."""

import os
import shutil
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers

from converter.checkpoint import Checkpoint
from converter.exportable import read_exportable
from converter.llama_cpp.layout import Layout, make_layout
from converter.llama_cpp.rope import Rope, read_rope
from converter.llama_cpp.tensors import GgufTensor, TensorMaker
from converter.llama_cpp.tokenizer import add_tokenizer
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.progress import progress_bar
from pruned_vllm.formats.config import without_converted_keys
from pruned_vllm.formats.geometry import ModelGeometry

KINDS = {
    torch.float32: (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    torch.float16: (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    torch.bfloat16: (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}


def export_gguf(directory: Path, target: Path, *, without_tokenizer: bool = False) -> tuple[str, tuple[str, ...]]:
    """Writes a converted model, or a stock one, to the file `target`, which appears whole or not at all.

    Args:
        without_tokenizer: leave the tokenizer out; the file then takes and gives ids of tokens.

    Returns:
        llama.cpp's name of the architecture, and sentences for the user.

    Raises:
        InputError: llama.cpp cannot be told this model or its tokenizer; or `target` exists.
        OSError: the disk cannot be written.
    """
    if os.path.lexists(target):
        raise InputError(f"{target} exists; remove it, or choose another file")
    instead = "; export float weights, and quantize them with llama-quantize"
    checkpoint, geometry = read_exportable(directory, instead)
    layout = make_layout(geometry)
    config = _hugging_face_config(geometry, checkpoint)
    rope = read_rope(config, geometry.head_dim, layout.architecture)
    maker = TensorMaker(checkpoint, geometry, layout)
    tensors = list(maker.tensors())
    partial = target.with_name(f".{target.name}.partial")
    writer = gguf.GGUFWriter(partial, layout.architecture.name)
    _add_sizes(writer, directory, layout, config, rope, tensors)
    add_tokenizer(writer, directory, geometry.vocab_size, without=without_tokenizer)
    _check_room(target, tensors)
    try:
        _write(writer, maker, tensors, rope)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return layout.architecture.name, (*layout.notes, *rope.notes)


def _hugging_face_config(geometry: ModelGeometry, checkpoint: Checkpoint) -> transformers.PretrainedConfig:
    """The configuration without the sizes of single layers: it knows the defaults of all other keys."""
    plain = without_converted_keys(checkpoint.config, geometry.family)
    plain.pop("architectures", None)
    try:
        return transformers.CONFIG_MAPPING[geometry.family.model_type].from_dict(plain)
    except Exception as error:  # its checks raise errors of many kinds
        raise InputError(f"{checkpoint.directory / 'config.json'}: Transformers refuses it: {error}") from None


def _add_sizes(
    writer: gguf.GGUFWriter,
    directory: Path,
    layout: Layout,
    config: transformers.PretrainedConfig,
    rope: Rope,
    tensors: list[GgufTensor],
) -> None:
    geometry = layout.geometry
    heads = [layer.num_attention_heads for layer in geometry.layers]
    kv_heads = [layer.num_key_value_heads for layer in geometry.layers]
    widths = [layer.intermediate_size for layer in geometry.layers]
    one_size = not layout.architecture.layers_may_differ
    writer.add_name(directory.resolve().name)
    (embedding,) = (tensor.dtype for tensor in tensors if tensor.name == "token_embd.weight")
    writer.add_file_type(KINDS[embedding][1])
    writer.add_vocab_size(geometry.vocab_size)
    writer.add_context_length(rope.context_length)
    writer.add_embedding_length(geometry.hidden_size)
    writer.add_block_count(len(geometry.layers))
    writer.add_head_count(heads[0] if one_size else heads)
    writer.add_head_count_kv(kv_heads[0] if one_size else kv_heads)
    writer.add_feed_forward_length(widths[0] if one_size else widths)
    writer.add_key_length(geometry.head_dim)
    writer.add_value_length(geometry.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(geometry.head_dim)
    writer.add_rope_freq_base(rope.theta)
    if rope.linear_factor is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.linear_factor)


def _check_room(target: Path, tensors: list[GgufTensor]) -> None:
    needed = sum(tensor.dtype.itemsize * torch.Size(tensor.shape).numel() for tensor in tensors)
    free = shutil.disk_usage(target.absolute().parent).free
    if needed > free:
        raise InputError(f"{target} needs {needed:,} bytes, but its disk has {free:,} left")


def _write(writer: gguf.GGUFWriter, maker: TensorMaker, tensors: list[GgufTensor], rope: Rope) -> None:
    """Announces all tensors, then reads and writes one after the other."""
    if rope.frequency_factors is not None:
        factors = rope.frequency_factors.numpy()
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for tensor in tensors:
        *rows, columns = tensor.shape
        nbytes = tensor.dtype.itemsize * torch.Size(tensor.shape).numel()
        as_bytes = (*rows, columns * tensor.dtype.itemsize)  # NumPy has no bfloat16
        writer.add_tensor_info(tensor.name, as_bytes, np.dtype(np.uint8), nbytes, raw_dtype=KINDS[tensor.dtype][0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if rope.frequency_factors is not None:
        writer.write_tensor_data(rope.frequency_factors.numpy())
    for tensor in progress_bar(tensors, desc="exporting", unit=" tensors"):
        writer.write_tensor_data(maker.read(tensor).view(torch.uint8).numpy())
    writer.close()
