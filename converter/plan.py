"""Decides everything about a conversion before anything is written, and refuses what cannot be done."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from converter.checkpoint import Checkpoint
from converter.fold import Cut, cut_layer, kept_layer
from converter.lora import LoraAdapter
from converter.mask_file import read_masks
from converter.shapes import with_aligned_width, with_even_groups, with_few_shapes
from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.agreement import refusals
from pruned_vllm.formats.companions import find_companions
from pruned_vllm.formats.config import converted_config, dense_geometry
from pruned_vllm.formats.fingerprint import Fingerprint
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.headers import dense_problems
from pruned_vllm.formats.hub import MODEL_FILES, download, model_directory
from pruned_vllm.formats.layer import LayerGeometry
from pruned_vllm.formats.masked import FORMAT_VERSION, PRUNING_FILE, PruningInfo
from pruned_vllm.formats.weights import has_weight_files, unread_weights


@dataclass(frozen=True)
class Plan:
    """A conversion that can be done.

    Attributes:
        directory: the masked checkpoint.
        checkpoint: the dense weights.
        source: hub id of the dense model, where they came from the hub.
        info: pruning.json.
        dense, exact, pruned: geometries before, as the masks leave it, and as it is written: `exact` plus padding.
        alignment: of the FFN widths.
        cuts: by full tensor name; a tensor that is not named is copied.
        adapter: what is merged before the cuts, if anything.
    """

    directory: Path
    checkpoint: Checkpoint
    source: str | None
    info: PruningInfo
    dense: ModelGeometry
    exact: ModelGeometry
    pruned: ModelGeometry
    alignment: int
    cuts: dict[str, Cut]
    adapter: LoraAdapter | None

    def bytes_of(self, geometry: ModelGeometry) -> int:
        """Bytes of the tensors of `geometry` in the dtypes of the checkpoint."""
        return self.checkpoint.bytes_of(geometry.tensor_shapes())

    def config(self) -> dict[str, Any]:
        """The converted config.json."""
        config = dict(self.checkpoint.config)
        config.pop("auto_map", None)  # code shipped with the dense model does not know the new shapes
        return converted_config(self.pruned, config) | {
            "pruning": {
                "format_version": FORMAT_VERSION,
                "method": self.info.method,
                "source": self.source,
                "alignment": self.alignment,
                "sizes": {
                    "parameters": [self.dense.num_parameters, self.pruned.num_parameters],
                    "num_key_value_heads": [self.dense.num_key_value_heads, self.pruned.num_key_value_heads],
                },
            }
        }


def make_plan(
    directory: Path,
    base_model: str | None = None,
    *,
    revision: str | None = None,
    gqa_layout: Literal["compact", "padded"] = "compact",
    alignment: int = 1,
    max_distinct_shapes: int | None = None,
) -> Plan:
    """Reads the masked checkpoint in `directory` and checks all of it.

    Args:
        base_model: directory or hub id of the dense model; takes the place of any other weights.
        revision: commit, branch or tag of a model of the hub; None is the one that the masks were learned on, if
            pruning.json says so, else the main branch.
        gqa_layout: "compact" writes the heads that are left; "padded" pads every query group to its layer's widest.
        alignment: pads FFN widths to multiples of this, at most to the dense width. Experts of different widths stay
            as they are: their kernels take any number of rows.
        max_distinct_shapes: pads layers until there are at most so many different ones, at the least possible bytes.

    Raises:
        InputError: with every problem of the first stage that has any (files, config, tensors and masks, geometry).
    """
    if not directory.is_dir():
        raise InputError(f"{directory} is not a directory; give the masked checkpoint that learn-masks wrote")
    info = PruningInfo.read(directory)
    weights, source = _find_weights(directory, info, base_model, revision)
    checkpoint = Checkpoint(weights)
    _check_fingerprint(directory, info, weights)
    dense = dense_geometry(weights, checkpoint.config)
    if dense.experts is not None and max_distinct_shapes is not None:
        raise InputError(
            f"--max-distinct-shapes is for models without experts, and {dense.family.architecture} has some; "
            "their layers are served at any width without padding"
        )

    problems = [f"config.json: {problem}" for problem in refusals(dense.family, checkpoint.config)]
    problems += dense_problems(checkpoint.tensors, dense)
    masks, adapter = [], None
    try:
        masks = read_masks(directory, dense)
    except InputError as error:
        problems.append(str(error))
    try:
        if info.lora_adapter is not None:
            adapter = LoraAdapter.read(directory / info.lora_adapter, checkpoint, dense)
    except InputError as error:
        problems.append(str(error))
    try:
        find_companions(weights)
    except InputError as error:
        problems.append(str(error))
    if problems:
        raise InputError(f"{directory} cannot be converted:", problems)

    exact = [kept_layer(layer, layer_masks) for layer, layer_masks in zip(dense.layers, masks, strict=True)]
    layers = exact if gqa_layout == "compact" else [with_even_groups(layer) for layer in exact]
    layers = [
        with_aligned_width(layer, alignment, before.intermediate_size or before.expert_width)
        for layer, before in zip(layers, dense.layers, strict=True)
    ]
    if max_distinct_shapes is not None:

        def layer_bytes(layer: LayerGeometry) -> int:
            return checkpoint.bytes_of(dense.with_layers((layer,)).layer_tensor_shapes(0))

        layers = with_few_shapes(layers, layer_bytes, max_distinct_shapes)
    cuts: dict[str, Cut] = {}
    for index, (layer_masks, layer) in enumerate(zip(masks, layers, strict=True)):
        layer_cuts = cut_layer(
            dense.family, dense.layers[index], dense.head_dim, layer_masks, info.channel_mask_site, layer
        )
        cuts |= {f"model.layers.{index}.{name}": cut for name, cut in layer_cuts.items()}
    return Plan(
        directory=directory,
        checkpoint=checkpoint,
        source=source,
        info=info,
        dense=dense,
        exact=dense.with_layers(tuple(exact)),
        pruned=dense.with_layers(tuple(layers)),
        alignment=alignment,
        cuts=cuts,
        adapter=adapter,
    )


def _check_fingerprint(directory: Path, info: PruningInfo, weights: Path) -> None:
    """Refuses weights that the masks do not belong to."""
    if info.base_fingerprint is None:
        return
    differences = Fingerprint.parse(info.base_fingerprint).differences(Fingerprint.from_directory(weights))
    if differences:
        name = info.base_model or "those that were beside them"
        commit = f" at revision {info.base_revision}" if info.base_revision else ""
        raise InputError(
            f"The masks in {directory} were learned for other weights ({name}{commit}) than those in {weights}. Give "
            "the model that they were learned for with --base-model, or learn masks for this one. If it is the right "
            f"one nevertheless, remove base_fingerprint from {directory / PRUNING_FILE}. What differs:",
            differences,
        )


def _find_weights(
    directory: Path, info: PruningInfo, base_model: str | None, revision: str | None
) -> tuple[Path, str | None]:
    """The directory of the dense weights, and their hub id if they come from the hub.

    A base model given by the user counts first, then weights beside the masks, then the one in pruning.json (relative
    to the masked checkpoint).

    Raises:
        InputError: there are none, or they are elsewhere, but beside the masks is something that may have been meant.
    """
    if base_model is not None:
        name, find = base_model, model_directory
    elif has_weight_files(directory):
        return model_directory(str(directory), MODEL_FILES, revision)
    elif info.base_model is not None:
        name, find = str(directory / info.base_model), model_directory
        if not Path(name).is_dir():
            name, find, revision = info.base_model, download, revision or info.base_revision
    else:
        unread_names = ", ".join(unread_weights(directory))
        raise InputError(
            f"{directory} holds no weights as safetensors{f', but {unread_names},' if unread_names else ''} and "
            f"{PRUNING_FILE} names no base_model; give the dense model with --base-model"
        )
    if unread := unread_weights(directory):
        raise InputError(
            f"{directory} holds {', '.join(unread)}, which would be ignored: pickled weights are never read, and the "
            f"base model {name} would take their place. If the masks belong to these weights, save them with "
            "save_pretrained of Transformers, and an adapter into a subdirectory that lora_adapter names; else move "
            "them away"
        )
    try:
        weights, commit = find(name, MODEL_FILES, revision)
        return weights, name if commit else None
    except InputError as error:
        raise InputError(f"base_model {error}; give the dense model with --base-model") from None
