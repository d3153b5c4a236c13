"""Where a model lies that is named by a directory or by its id on the Hugging Face hub.

Of a model on the hub one snapshot is taken. Whoever reads all files from its directory reads one state of the model,
even if the model is changed on the hub meanwhile.
"""

from pathlib import Path

from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.companions import DOWNLOADED
from pruned_vllm.formats.weights import WEIGHT_PATTERNS

MODEL_FILES = ["config.json", *WEIGHT_PATTERNS, *DOWNLOADED]


def model_directory(name: str, patterns: list[str], revision: str | None = None) -> tuple[Path, str | None]:
    """The directory `name` and None, or a snapshot of the hub's model of that name and its commit.

    Args:
        patterns: what of the snapshot is needed; it is downloaded where it is not in the cache.
        revision: commit, branch or tag of a model of the hub; None is its main branch.

    Raises:
        InputError: there is neither, or there is a directory, but a revision too.
    """
    if Path(name).is_dir():
        if revision is not None:
            raise InputError(f"{name} is a directory; --revision {revision} is for models of the hub")
        return Path(name), None
    return download(name, patterns, revision)


def download(name: str, patterns: list[str], revision: str | None = None) -> tuple[Path, str]:
    """As `model_directory`, for the id of a model on the hub. Raises InputError."""
    from huggingface_hub import snapshot_download  # late: directories do not need it
    from huggingface_hub.errors import HFValidationError

    try:
        snapshot = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (OSError, HFValidationError) as error:
        what = f"{name!r} at revision {revision!r}" if revision else repr(name)
        raise InputError(
            f"{what} is neither a directory nor a model that can be downloaded from the hub ({error})"
        ) from None
    return snapshot, snapshot.name  # the cache names the directory of a snapshot after its commit
