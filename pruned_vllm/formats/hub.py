"""Where a model lies that is named by a directory or by its id on the Hugging Face hub."""

from pathlib import Path

from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import COMPANIONS
from pruned_vllm.formats.weights import WEIGHT_PATTERNS


def model_directory(name: str, *, with_code: bool = False) -> Path:
    """The directory `name`, or a snapshot of the hub's model of that name, downloaded where it is not in the cache.

    Args:
        with_code: whether to download Python files too.

    Raises:
        InputError: there is neither.
    """
    return Path(name) if Path(name).is_dir() else download(name, with_code=with_code)


def download(name: str, *, with_code: bool = False) -> Path:
    """As `model_directory`, for the id of a model on the hub. Raises InputError."""
    from huggingface_hub import snapshot_download  # late: directories do not need it
    from huggingface_hub.errors import HFValidationError

    patterns = ["config.json", *WEIGHT_PATTERNS, *COMPANIONS, *(["*.py"] if with_code else [])]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (OSError, HFValidationError) as error:
        raise InputError(
            f"{name!r} is neither a directory nor a model that can be downloaded from the hub ({error})"
        ) from None
