"""Where a model lies that is named by a directory or by its id on the Hugging Face hub."""

from pathlib import Path

from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.companions import DOWNLOADED
from pruned_vllm.formats.weights import WEIGHT_PATTERNS

MODEL_FILES = ["config.json", *WEIGHT_PATTERNS, *DOWNLOADED]


def model_directory(name: str, patterns: list[str]) -> Path:
    """The directory `name`, or a snapshot of the hub's model of that name.

    Args:
        patterns: what of the snapshot is needed; it is downloaded where it is not in the cache.

    Raises:
        InputError: there is neither.
    """
    return Path(name) if Path(name).is_dir() else download(name, patterns)


def download(name: str, patterns: list[str]) -> Path:
    """As `model_directory`, for the id of a model on the hub. Raises InputError."""
    from huggingface_hub import snapshot_download  # late: directories do not need it
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (OSError, HFValidationError) as error:
        raise InputError(
            f"{name!r} is neither a directory nor a model that can be downloaded from the hub ({error})"
        ) from None
