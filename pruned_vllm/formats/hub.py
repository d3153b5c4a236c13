"""Models on the Hugging Face hub: where a model lies that is named by its id there, and how one gets there.

Of a model on the hub one snapshot is taken. Whoever reads all files from its directory reads one state of the model,
even if the model is changed on the hub meanwhile. With HF_HUB_OFFLINE=1 what was downloaded before is taken.
"""

import re
from pathlib import Path

from pruned_vllm.common.errors import InputError
from pruned_vllm.common.manifest import MANIFEST
from pruned_vllm.formats.companions import DOWNLOADED
from pruned_vllm.formats.weights import WEIGHT_PATTERNS, has_weight_files

MODEL_FILES = ["config.json", *WEIGHT_PATTERNS, *DOWNLOADED]

# What pruning projects write: masks and adapters in subdirectories too, state dicts of torch, lists of layers.
PRUNED_FILES = [*MODEL_FILES, "*.json", "*.txt", "*.pt", "pruning_masks.safetensors", "*adapter_model.safetensors"]
PRUNED_FILES += ["*subblocks_safetensors/*"]
PICKLED_WEIGHTS = ["*.bin", "*.pth"]  # only where there are no others: many repositories have both

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def is_hub_id(name: str) -> bool:
    """Whether a name may be the id of a model on the hub, rather than a path."""
    return _HUB_ID.fullmatch(name) is not None and not name.startswith(".")


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


def pruned_model_directory(name: str, revision: str | None = None) -> Path:
    """A snapshot of the hub's repository of that name, with what pruning projects write. Raises InputError."""
    directory, _ = download(name, PRUNED_FILES, revision)
    if not has_weight_files(directory):
        directory, _ = download(name, PRUNED_FILES + PICKLED_WEIGHTS, revision)
    return directory


def local_input(path: Path, revision: str | None = None) -> tuple[Path, str | None, str | None]:
    """Where INPUT lies on this machine, its id if it was on the hub, and the revision that is left for other models.

    Args:
        revision: of INPUT where that is on the hub, else of a dense model that belongs to it.
    """
    if path.exists() or not is_hub_id(str(path)):
        return path, None, revision
    return pruned_model_directory(str(path), revision), str(path), None


def download(name: str, patterns: list[str], revision: str | None = None) -> tuple[Path, str]:
    """As `model_directory`, for the id of a model on the hub. Raises InputError."""
    from huggingface_hub import snapshot_download  # late: directories do not need it
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        snapshot = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (OSError, HTTPError, HFValidationError) as error:
        what = f"{name!r} at revision {revision!r}" if revision else repr(name)
        raise InputError(
            f"{what} is neither a directory nor a model that can be downloaded from the hub ({error})"
        ) from None
    return snapshot, snapshot.name  # the cache names the directory of a snapshot after its commit


def upload(directory: Path, name: str) -> str:
    """Uploads a model directory as the hub's model `name`, which is made if there is none; returns its address.

    Raises:
        InputError: it cannot be uploaded; the directory stays as it is.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        api = HfApi()
        api.create_repo(name, exist_ok=True)
        message = "Upload of a model that was converted by pruned-vllm"
        api.upload_folder(repo_id=name, folder_path=directory, commit_message=message, ignore_patterns=[MANIFEST])
    except (OSError, HTTPError, HFValidationError) as error:
        raise InputError(
            f"{directory} is complete, but it could not be uploaded to {name!r} ({error}). Log in with `hf auth "
            f"login`, or go online, and upload it: hf upload {name} {directory}"
        ) from None
    return f"https://huggingface.co/{name}"
