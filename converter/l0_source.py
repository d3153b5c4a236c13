"""What Compresso, LoRaPruner and NutePrune have in common: masks and LoRA weights become a `Source`.

The attention output of head h was multiplied by head_z[h], the gate and the up projection by intermediate_z, both
before the activation. What differs between the projects is in `Project`, and each importer says it.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from converter.base_model import CONFIG_FILES, find_base_model, read_base_model
from converter.checkpoint import Checkpoint
from converter.l0_masks import (
    L0_FILE,
    LORA_FILE,
    ZS_FILE,
    L0Masks,
    mask_directory,
    read_masks,
    recognised_masks,
)
from converter.loralib import LoralibWeights, read_loralib
from converter.source import HiddenMask, Request, Source
from converter.zero_units import find_zero_units
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import read_json
from pruned_vllm.formats.config import dense_geometry
from pruned_vllm.formats.config_values import shown
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.headers import dense_problems
from pruned_vllm.formats.masked import LayerMasks
from pruned_vllm.formats.weights import has_weight_files

NORM_DIVISOR = 4096  # of the RMSNorm in Compresso and in NutePrune's Llama, whatever the hidden size is

# What merge_weights.py of the three projects leaves in config.json. LoRaPruner's merges LoRA weights alone, no masks.
MERGED_KEYS = ("lora_rank", "lora_alpha", "lora_param", "lora_layers")


@dataclass(frozen=True)
class Project:
    """The rules of a project.

    Attributes:
        name, method: for people, and for the new config.json.
        model_types: the models that it has code for.
        hidden_mask: what hidden_z (None where there is none) did in a model of this type, and how its RMSNorm divides.
        gated: a layer whose gate (head_layer_z, mlp_z) is below 0.5 is left whole; else gates do nothing.
        original_llama: see `model_problems`.
    """

    name: str
    method: str
    model_types: tuple[str, ...]
    hidden_mask: Callable[[str, torch.Tensor | None], HiddenMask]
    gated: bool
    original_llama: bool

    def problems_of(self, dense: ModelGeometry, config: Mapping[str, Any]) -> list[str]:
        """What of this model the project's own code does not know."""
        return model_problems(self.name, self.model_types, self.original_llama, dense, config)


def recognised_merge(path: Path) -> str | None:
    """What says that merge_weights.py of one of the projects wrote a model directory; not of which."""
    if not (path / "config.json").is_file() or not has_weight_files(path) or mask_directory(path) is not None:
        return None
    config = read_json(path / "config.json")
    return f"{' and '.join(MERGED_KEYS[:2])} in config.json" if all(key in config for key in MERGED_KEYS) else None


def recognise(path: Path) -> str | None:
    """As every importer has it. The three projects cannot be told apart by their files."""
    return recognised_masks(path, head_rank=5) or recognised_merge(path)


def read_project(request: Request, project: Project) -> Source:
    """Reads masks (a directory, zs.pt or l0_module.pt), or a merged model. Raises InputError."""
    directory = mask_directory(request.path)
    if directory is not None:
        return _read_masks_and_base(request, directory, project)
    if recognised_merge(request.path):
        return _read_merged(request, project)
    raise InputError(
        f"{request.path} holds neither {ZS_FILE} nor {L0_FILE}, nor a model with {', '.join(MERGED_KEYS)} in "
        f"config.json; give the directory that {project.name} wrote its masks to"
    )


def _read_masks_and_base(request: Request, directory: Path, project: Project) -> Source:
    base = read_base_model(request, "masks, but no weights")
    masks, problems = read_masks(directory).placed(base.dense)
    problems += project.problems_of(base.dense, base.checkpoint.config)
    changes: LoralibWeights | None = None
    file, alpha = directory / LORA_FILE, request.settings.get("lora_alpha")
    try:
        if file.is_file():
            changes = read_loralib(file, base.dense, alpha)
        elif alpha is not None:
            problems.append(f"--lora-alpha scales the LoRA weights in {LORA_FILE}, which is not there")
    except InputError as error:
        problems += [f"{LORA_FILE}: {problem}" for problem in error.problems] or [str(error)]
    layers = range(len(base.dense.layers))
    return Source(
        weights=base.checkpoint,
        method=project.method,
        dense=base.dense,
        layers=base.dense.layers,
        masks=[LayerMasks() if problems else _layer_masks(masks, layer, project.gated) for layer in layers],
        channel_mask_site="gate_and_up",
        hidden=None if problems else project.hidden_mask(base.dense.family.model_type, masks.hidden),
        changes=changes,
        hub_id=base.hub_id,
        inputs=(directory, base.directory),
        companions=base.directory,
        notes=tuple(_notes(masks, project, len(layers))),
        problems=tuple(problems),
    )


def _layer_masks(masks: L0Masks, layer: int, gated: bool) -> LayerMasks[torch.Tensor]:
    def mask(key: str, gate_key: str) -> torch.Tensor | None:
        gate = masks.of_layer(gate_key, layer) if gated else None
        return None if gate is not None and gate < 0.5 else masks.of_layer(key, layer)

    return LayerMasks(head=mask("head_z", "head_layer_z"), channel=mask("intermediate_z", "mlp_z"))


def _notes(masks: L0Masks, project: Project, num_layers: int) -> list[str]:
    notes = []
    covered = next((len(mask) for key, mask in masks.values.items() if key != "hidden_z"), num_layers)
    if covered < num_layers and masks.first_layer is not None:
        last = masks.first_layer + covered - 1
        notes.append(f"{masks.file.name} has masks for layers {masks.first_layer} to {last}; the others stay whole.")
    closed = sum(int((masks.values[key] < 0.5).sum()) for key in ("head_layer_z", "mlp_z") if key in masks.values)
    if closed and not project.gated:
        notes.append(
            f"{closed} gates (head_layer_z, mlp_z) are 0. {project.name}'s model has no gates, so the masks of these "
            "layers count all the same; its merge_weights.py leaves such layers whole, as --from compresso does."
        )
    return notes


def _read_merged(request: Request, project: Project) -> Source:
    """A dense model with zero rows where units were: of v_proj for a head, of gate_proj and up_proj for a channel."""
    directory = request.path
    weights = Checkpoint.from_directory(directory)
    dense = dense_geometry(directory, weights.config)
    problems = project.problems_of(dense, weights.config) or dense_problems(weights.tensors, dense)
    if request.settings.get("lora_alpha") is not None:
        problems.append("--lora-alpha changes nothing: the LoRA weights of a merged model are in its weights")
    if problems:
        raise InputError(f"{directory} cannot be converted:", problems)
    tokenizer = directory
    if request.base_model is not None:
        tokenizer, _ = find_base_model(request, "a model", CONFIG_FILES)
    dead = _dimensions_without_outputs(weights, dense)
    note = (
        f"{dead:,} of {dense.hidden_size:,} hidden dimensions get nothing from any layer. {project.name}'s "
        "merge_weights.py leaves the hidden mask out of the embedding, so this is not quite the model that was "
        "trained, and these dimensions cannot go. zs.pt and lora_weights.pt with --base-model give the exact one."
    )
    return Source(
        weights=weights,
        method=project.method,
        dense=dense,
        layers=dense.layers,
        masks=find_zero_units(weights, dense, _rows_of_units(dense)).masks,
        hidden=project.hidden_mask(dense.family.model_type, None),
        inputs=(directory, tokenizer),
        companions=tokenizer,
        notes=(note,) if dead else (),
    )


def _rows_of_units(dense: ModelGeometry) -> list[str]:
    """The weights whose rows a merge makes zero."""
    projections = ("self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    return [f"model.layers.{layer}.{name}.weight" for layer in range(len(dense.layers)) for name in projections]


def _dimensions_without_outputs(weights: Checkpoint, dense: ModelGeometry) -> int:
    written = torch.zeros(dense.hidden_size, dtype=torch.bool)
    for layer in range(len(dense.layers)):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            written |= weights.read(f"model.layers.{layer}.{name}.weight").any(dim=1)
    return int((~written).sum())


def model_problems(
    name: str, model_types: Collection[str], original_llama: bool, dense: ModelGeometry, config: Mapping[str, Any]
) -> list[str]:
    """What of a model the code of project `name` does not know, so that it cannot be its base model.

    Args:
        model_types: those that it has code for.
        original_llama: its code knows Llama as it was first published, with neither grouped queries nor other rotary
            angles. What it computes with a later model is not what Hugging Face does.
    """
    if dense.family.model_type not in model_types:
        return [f"model_type is {dense.family.model_type}; {name} prunes {' and '.join(model_types)} alone"]
    problems, layer = [], dense.dense_layers[0]
    heads, kv_heads = layer.num_attention_heads, layer.num_key_value_heads
    if dense.qkv_bias or dense.o_bias or dense.mlp_bias:
        problems.append(f"config.json says that there are biases; {name} knows none")
    if heads * dense.head_dim != dense.hidden_size:
        problems.append(
            f"head_dim is {dense.head_dim}; {name} takes hidden_size / num_attention_heads for it, "
            f"{dense.hidden_size} / {heads}"
        )
    if original_llama and kv_heads != heads:
        problems.append(f"there are {heads} query heads and {kv_heads} KV heads; {name} knows no grouped queries")
    rope = config.get("rope_scaling") or config.get("rope_parameters")
    rope = rope if isinstance(rope, Mapping) else {}
    theta = config.get("rope_theta") or rope.get("rope_theta") or 10000
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if original_llama and (theta != 10000 or kind != "default"):
        problems.append(
            f"rope_theta is {shown(theta)} and rope_type {shown(kind)}; {name} computes all angles with 10000 and "
            "without scaling"
        )
    return problems
