"""Sheared LLaMA of LLM-Shearing, before its conversion to Hugging Face: latest-rank0.pt with masks inside,
pruned-latest-rank0.pt without, or masks alone (zs_s*.pt). Needs --base-model: Llama as it was before.

As its models/composer_llama.py computes (commit b87218b): head_z and intermediate_z multiply the attention output and
the up projection; head_layer_z and mlp_z what attention and MLP add; hidden_z that too, and the output of every
RMSNorm, which sees the kept dimensions alone. The output of the embedding is multiplied by it where masks are given to
the model, as zs_s*.pt are, but not where they are inside. The project's own pruning, which writes
pruned-latest-rank0.pt, multiplies embedding and lm_head by it too, so it computes a little different from
latest-rank0.pt.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from converter.base_model import CONFIG_FILES, find_base_model, read_base_model
from converter.checkpoint import Checkpoint
from converter.composer import ComposerModel, is_composer, live_masks, read_composer
from converter.importers.shapes import source_from_shapes
from converter.l0_masks import UNIT_AXES, L0Masks, masks_from_zs, recognised_masks
from converter.l0_source import model_problems
from converter.source import HiddenMask, Request, Source
from converter.torch_files import is_torch_file, read_torch_file
from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.config import dense_geometry, read_config
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.masked import LayerMasks

NAME = "Sheared LLaMA"
CHECKPOINTS, MASKS = "*-rank0.pt", "zs*.pt"


def recognise(path: Path) -> str | None:
    if path.is_dir():
        checkpoints = sorted(file.name for file in path.glob(CHECKPOINTS))
        found = checkpoints or sorted(file.name for file in path.glob(MASKS) if recognised_masks(file, head_rank=4))
        return ", ".join(found) or None
    if found_masks := recognised_masks(path, head_rank=4):
        return found_masks
    is_model = is_torch_file(path) and (path.match(CHECKPOINTS) or is_composer(read_torch_file(path)))
    return "tensors of a Composer checkpoint" if is_model else None


def read(request: Request) -> Source:
    file = _file(request.path)
    content = read_torch_file(file)
    if isinstance(content, dict) and set(content) & set(UNIT_AXES):
        return _read_masks_alone(request, file, content)
    model = read_composer(file, content)
    directory, _ = find_base_model(request, "tensors, but no config.json", CONFIG_FILES)
    config = read_config(directory)
    base = dense_geometry(directory, config)
    if problems := model_problems(NAME, ("llama",), True, base, config):
        raise InputError(f"--base-model {directory} is not what {file} was pruned from:", problems)
    weights = Checkpoint.from_tensors(file, _config(model, config, base), model.tensors)
    if not model.log_alphas:
        source = source_from_shapes(weights, request, "sheared")
    else:
        masks, notes = live_masks(model)
        source = _masked_source(weights, masks, embedding_is_masked=False)
        source = replace(source, notes=(*source.notes, *notes))
    return replace(source, inputs=(file, directory), companions=directory)


def _file(path: Path) -> Path:
    """The file that is meant. Raises InputError where a directory has several."""
    if path.is_file():
        return path
    files = sorted(path.glob(CHECKPOINTS)) or sorted(path.glob(MASKS))
    if len(files) != 1:
        found = f"several files: {', '.join(file.name for file in files)}" if files else f"no {CHECKPOINTS} or {MASKS}"
        raise InputError(
            f"{path} has {found}; give the file that you mean. pruned-latest-rank0.pt is what the project's own "
            "pruning made of latest-rank0.pt"
        )
    return files[0]


def _config(model: ComposerModel, base_config: dict[str, Any], base: ModelGeometry) -> dict[str, Any]:
    """The base model's config.json with the largest sizes that the tensors have."""
    hidden_size, before = model.size("model.embed_tokens", 1), base.dense_layers[0].num_attention_heads
    heads = model.size("self_attn.q_proj", 0) // base.head_dim
    if not heads or (hidden_size % heads and not hidden_size % before):
        heads = before  # LlamaConfig wants a number that divides the hidden size; the layers have their own beside it
    dtype = model.tensors["model.embed_tokens.weight"].dtype
    return {
        **{key: value for key, value in base_config.items() if key != "torch_dtype"},
        "dtype": str(dtype).removeprefix("torch."),
        "hidden_size": hidden_size,
        "vocab_size": model.size("model.embed_tokens", 0),
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": base.head_dim,
        "intermediate_size": model.size("mlp.gate_proj", 0) or base.dense_layers[0].intermediate_size,
        "tie_word_embeddings": False,
    }


def _read_masks_alone(request: Request, file: Path, content: Any) -> Source:
    base = read_base_model(request, "masks, but no weights")
    problems = model_problems(NAME, ("llama",), True, base.dense, base.checkpoint.config)
    source = _masked_source(base.checkpoint, masks_from_zs(file, content, first_layer=0), embedding_is_masked=True)
    note = (
        f"{file.name} has masks alone. LLM-Shearing trains the weights with them, so those of the dense model are the "
        "right ones only where nothing was trained but the masks; latest-rank0.pt has both."
    )
    return replace(
        source,
        hub_id=base.hub_id,
        inputs=(file, base.directory),
        companions=base.directory,
        notes=(*source.notes, note),
        problems=(*source.problems, *problems),
    )


def _masked_source(weights: Checkpoint, masks: L0Masks, embedding_is_masked: bool) -> Source:
    """A dense model and masks for all its layers."""
    dense = dense_geometry(weights.directory, weights.config)
    placed, problems = masks.placed(dense)
    problems += [
        f"{masks.file.name}: {key} has masks for {len(mask)} layers, the model has {len(dense.layers)}"
        for key, mask in masks.values.items()
        if key != "hidden_z" and len(mask) != len(dense.layers)
    ]
    hidden = masks.hidden
    return Source(
        weights=weights,
        method="sheared",
        dense=dense,
        layers=dense.layers,
        masks=[LayerMasks() if problems else _layer_masks(placed, dense, i) for i in range(len(dense.layers))],
        hidden=None
        if problems or hidden is None
        else HiddenMask(hidden if embedding_is_masked else None, outputs=hidden, norms=hidden, norm_sees_kept=True),
        problems=tuple(problems),
    )


def _layer_masks(masks: L0Masks, dense: ModelGeometry, layer: int) -> LayerMasks[torch.Tensor]:
    """What multiplies all that a sublayer adds goes into the mask of its units: they are what it adds."""
    sizes = dense.layers[layer]

    def mask(key: str, layer_key: str, units: int) -> torch.Tensor | None:
        units_mask, layer_mask = masks.of_layer(key, layer), masks.of_layer(layer_key, layer)
        if layer_mask is None:
            return units_mask
        return layer_mask * (torch.ones(units) if units_mask is None else units_mask)

    return LayerMasks(
        head=mask("head_z", "head_layer_z", sizes.num_attention_heads),
        channel=mask("intermediate_z", "mlp_z", sizes.intermediate_size),
    )
