"""A masked checkpoint of learn-masks: pruning_masks.safetensors, pruning.json, the dense model beside them or named.

Reads a model directory, or nothing but the two files and --base-model. The head mask multiplied the attention output of
its head, the channel mask what pruning.json says. See the README, Formats.
"""

from pathlib import Path

import torch

from converter.checkpoint import Checkpoint
from converter.lora import LoraAdapter
from converter.mask_file import read_masks
from converter.source import Request, Source
from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.config import dense_geometry
from pruned_vllm.formats.fingerprint import Fingerprint
from pruned_vllm.formats.hub import MODEL_FILES, download, model_directory
from pruned_vllm.formats.masked import MASKS_FILE, PRUNING_FILE, LayerMasks, PruningInfo
from pruned_vllm.formats.weights import has_weight_files, unread_weights

NAME = "learn-masks"


def recognise(path: Path) -> str | None:
    found = [name for name in (PRUNING_FILE, MASKS_FILE) if (path / name).exists()]
    return " and ".join(found) or None


def read(request: Request) -> Source:
    """Reads a masked checkpoint. Problems of masks and of the adapter are in the result: the caller adds others."""
    directory = request.path
    if not directory.is_dir():
        raise InputError(f"{directory} is not a directory; give the masked checkpoint that learn-masks wrote")
    info = PruningInfo.read(directory)
    weights, hub_id = _find_weights(directory, info, request.base_model, request.revision)
    checkpoint = Checkpoint.from_directory(weights)
    _check_fingerprint(directory, info, weights)
    dense = dense_geometry(weights, checkpoint.config)
    problems: list[str] = []
    adapter = None
    masks: list[LayerMasks[torch.Tensor]] = [LayerMasks()] * len(dense.layers)
    try:
        masks = read_masks(directory, dense)
    except InputError as error:
        problems.append(str(error))
    try:
        if info.lora_adapter is not None:
            adapter = LoraAdapter.read(directory / info.lora_adapter, checkpoint, dense)
    except InputError as error:
        problems.append(str(error))
    return Source(
        weights=checkpoint,
        method=info.method,
        dense=dense,
        layers=dense.layers,
        masks=masks,
        channel_mask_site=info.channel_mask_site,
        changes=adapter,
        hub_id=hub_id,
        inputs=(directory, weights),
        companions=weights,
        problems=tuple(problems),
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
