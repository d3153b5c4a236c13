"""DDP (Deterministic Differentiable Pruning): trainable_params.pt with --base-model, the model that it was learned on.

Reads the file, or the directory step_N/ that holds it. A mask is relu(z_loga), whose values are not bounded. That of a
head multiplied its attention output, that of a channel act(gate) * up. Masks of experts belong to the layers that have
experts, in their order. The results that DDP pickles as whole models are read by --from llm-pruner.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from converter.base_model import read_base_model
from converter.mask_values import lost_heads, not_finite
from converter.source import Request, Source
from converter.torch_files import is_state_dict, is_torch_file, read_torch_file, texts_at_start
from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.layer import LayerGeometry
from pruned_vllm.formats.masked import LayerMasks

NAME = "DDP"

FILE = "trainable_params.pt"
_KEY = re.compile(r"(?:module\.)*l0_module\.masks\.(head|intermediate|expert)\.z_loga")
_MULTIPLIER = re.compile(r"(?:module\.)*l0_module\.lambdas\..+")  # of the loss; says nothing about the masks
# What the layers have that a kind of mask is for, and the shape of one layer's mask.
_KINDS: dict[str, tuple[str, Callable[[LayerGeometry], tuple[int, ...]]]] = {
    "head": ("attention", lambda layer: (layer.num_attention_heads,)),
    "intermediate": ("a dense MLP", lambda layer: (0 if layer.expert_intermediate_sizes else layer.intermediate_size,)),
    "expert": ("experts", lambda layer: (len(layer.expert_intermediate_sizes), layer.expert_width)),
}


def recognise(path: Path) -> str | None:
    if path.is_dir():
        return FILE if (path / FILE).is_file() else None
    is_ddp = is_torch_file(path) and any(map(_KEY.fullmatch, texts_at_start(path)))
    return f"{path.name} has l0_module.masks.*.z_loga" if is_ddp else None


def read(request: Request) -> Source:
    file = request.path / FILE if request.path.is_dir() else request.path
    if not file.exists():
        steps = sorted(str(found) for found in request.path.glob(f"step_*/{FILE}"))
        more = f", but {', '.join(steps[:5])}; give the one that is meant" if steps else ""
        raise InputError(f"{request.path} holds no {FILE}{more}")
    base = read_base_model(request, "masks, but no weights")
    content = read_torch_file(file)
    if not is_state_dict(content):
        raise InputError(f"{file} holds no tensors by their names, as DDP writes them")
    masks, problems = _masks(content, base.dense)
    return Source(
        weights=base.checkpoint,
        method="ddp",
        dense=base.dense,
        layers=base.dense.layers,
        masks=[LayerMasks()] * len(base.dense.layers) if problems else masks,
        channel_mask_site="product",
        hub_id=base.hub_id,
        inputs=(request.path, base.directory),
        companions=base.directory,
        notes=(f"The masks are pickled: {file.name}. Nothing in it was run.",),
        problems=tuple(f"{file.name}: {problem}" for problem in problems),
    )


def _masks(
    tensors: Mapping[str, torch.Tensor], dense: ModelGeometry
) -> tuple[list[LayerMasks[torch.Tensor]], list[str]]:
    """The masks of each layer, and what is wrong with them."""
    found: dict[str, dict[int, torch.Tensor]] = {}
    problems = []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            if not _MULTIPLIER.fullmatch(key):
                problems.append(f"{key[:200]!a}: unknown key; known: l0_module.masks.(head|intermediate|expert).z_loga")
            continue
        kind = match[1]
        if kind in found:
            problems.append(f"{key}: the masks of this kind are there twice")
        found[kind], more = _placed(key, tensor, kind, dense)
        problems += more
    if not found and not problems:
        problems.append("it holds no masks")
    masks = [
        LayerMasks(*(found.get(kind, {}).get(index) for kind in ("head", "intermediate", "expert")))
        for index in range(len(dense.layers))
    ]
    return masks, problems


def _placed(
    key: str, tensor: torch.Tensor, kind: str, dense: ModelGeometry
) -> tuple[dict[int, torch.Tensor], list[str]]:
    """The rows of a mask by the layer that each belongs to, and what is wrong with it."""
    what, shape_of = _KINDS[kind]
    shapes = {index: shape_of(layer) for index, layer in enumerate(dense.layers) if all(shape_of(layer))}
    shape = next(iter(shapes.values()), ())
    if not shapes:
        return {}, [f"{key} {list(tensor.shape)}: no layer of the model has {what}"]
    if not tensor.is_floating_point() or tensor.shape[1:] != shape:
        return {}, [f"{key}: {tensor.dtype} {list(tensor.shape)}; the model needs floats {[len(shapes), *shape]}"]
    if len(tensor) != len(shapes):
        return {}, [
            f"{key}: masks for {len(tensor)} layers, but the model has {len(shapes)} layers with {what} of "
            f"{len(dense.layers)}; which belong to which cannot be told"
        ]
    values = tensor.float().relu()
    if problem := not_finite(values) or (lost_heads(values, dense.family) if kind == "head" else None):
        return {}, [f"{key}: {problem}"]
    return dict(zip(shapes, values, strict=True)), []
