"""Dropped attention and MLP sublayers, listed by layer: EvoPress.

Reads `layer_drop_config.txt` (none, attn, mlp or attn+mlp a line, one for each layer), or a directory that holds it,
with --base-model. A dropped sublayer adds nothing to the hidden states, nor does its bias. `final_model.pth` beside the
list is not read: it holds the weights of all layers.
"""

from pathlib import Path

import torch

from converter.base_model import read_base_model
from converter.beside import with_weights_beside
from converter.source import Request, Source
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import read_lines
from pruned_vllm.formats.layer import LayerGeometry
from pruned_vllm.formats.masked import LayerMasks

NAME = "EvoPress, depth"
LIST_FILE = "layer_drop_config.txt"
WORDS = {"none": (), "attn": ("attn",), "mlp": ("mlp",), "attn+mlp": ("attn", "mlp")}


def recognise(path: Path) -> str | None:
    if path.is_dir():
        return LIST_FILE if (path / LIST_FILE).is_file() else None
    lines = read_lines(path) if path.suffix == ".txt" else []
    return "a list of dropped sublayers" if lines and all(line in WORDS for line in lines) else None


def read(request: Request) -> Source:
    file = request.path / LIST_FILE if request.path.is_dir() else request.path
    if not file.is_file():
        raise InputError(f"{request.path} has no {LIST_FILE}; give the list itself if it has another name")
    lines = read_lines(file)
    if not lines or any(line not in WORDS for line in lines):
        wrong = next((line for line in lines if line not in WORDS), "nothing")
        raise InputError(f"{file} holds {wrong!r:.80}; a line for each layer must be one of {', '.join(WORDS)}")
    base = read_base_model(with_weights_beside(request, file.parent), "a list of dropped sublayers")
    if len(lines) != len(base.dense.layers):
        layers = len(base.dense.layers)
        raise InputError(f"{file} has {len(lines)} lines, the model in {base.directory} {layers} layers")
    problems = [
        f"layer {index}: its linear attention cannot be dropped, since vLLM has one shape of state for all layers"
        for index, (line, layer) in enumerate(zip(lines, base.dense.layers, strict=True))
        if layer.linear_attention and "attn" in WORDS[line]
    ]
    if problems:
        raise InputError(f"{file} asks for what cannot be expressed:", problems)
    last = {"attn": "self_attn.o_proj.bias", "mlp": "mlp.down_proj.bias"}
    biases = {f"model.layers.{index}.{last[part]}" for index, line in enumerate(lines) for part in WORDS[line]}
    zeros = {name: torch.zeros_like(base.checkpoint.read(name)) for name in biases & base.checkpoint.tensors.keys()}
    return Source(
        weights=base.checkpoint.replaced({file: zeros}),
        method="depth",
        dense=base.dense,
        layers=base.dense.layers,
        masks=[_masks(layer, WORDS[line]) for layer, line in zip(base.dense.layers, lines, strict=True)],
        hub_id=base.hub_id,
        inputs=(request.path, base.directory),
        companions=base.directory,
    )


def _masks(layer: LayerGeometry, dropped: tuple[str, ...]) -> LayerMasks[torch.Tensor]:
    head = torch.zeros(layer.num_attention_heads) if "attn" in dropped else None
    if "mlp" not in dropped:
        return LayerMasks(head)
    experts = layer.expert_intermediate_sizes
    return LayerMasks(
        head,
        torch.zeros(layer.intermediate_size) if layer.intermediate_size else None,
        torch.zeros(len(experts), layer.expert_width) if experts else None,
    )
