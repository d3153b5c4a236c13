"""The dense model that a file without weights, or without a config.json, belongs to: --base-model."""

from dataclasses import dataclass
from pathlib import Path

from converter.checkpoint import Checkpoint
from converter.source import Request
from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.companions import DOWNLOADED
from pruned_vllm.formats.config import dense_geometry
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.hub import MODEL_FILES, model_directory

CONFIG_FILES = ["config.json", *DOWNLOADED]


@dataclass(frozen=True)
class BaseModel:
    """A dense model with its weights; `hub_id` is None for a directory."""

    directory: Path
    checkpoint: Checkpoint
    dense: ModelGeometry
    hub_id: str | None


def read_base_model(request: Request, holds: str) -> BaseModel:
    """The model that --base-model names.

    Args:
        holds: what is in the user's INPUT, for the message that it is not enough; "masks, but no weights".

    Raises:
        InputError: none is named, or it cannot be read.
    """
    directory, hub_id = find_base_model(request, holds, MODEL_FILES)
    checkpoint = Checkpoint.from_directory(directory)
    return BaseModel(directory, checkpoint, dense_geometry(directory, checkpoint.config), hub_id)


def find_base_model(request: Request, holds: str, files: list[str]) -> tuple[Path, str | None]:
    """Directory and hub id of the model that --base-model names, without looking into it.

    Args:
        holds: as for `read_base_model`.
        files: patterns of what is needed of it, where it is to be downloaded.
    """
    if request.base_model is None:
        raise InputError(
            f"{request.path} holds {holds}; give the dense model that it belongs to with --base-model DIR_OR_ID"
        )
    try:
        directory, commit = model_directory(request.base_model, files, request.revision)
    except InputError as error:
        raise InputError(f"--base-model {error}") from None
    return directory, request.base_model if commit else None
