"""Where a model lies that is named by a directory or by its id on the Hugging Face hub.

Of a model on the hub one snapshot is taken. Whoever reads all files from its directory reads one state of the model,
even if the model is changed on the hub meanwhile.
"""

from pathlib import Path

from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import COMPANIONS
from pruned_vllm.formats.weights import WEIGHT_PATTERNS


def model_directory(name: str, revision: str | None = None, *, with_code: bool = False) -> tuple[Path, str | None]:
    """The directory `name`, or a snapshot of the hub's model of that name, downloaded where it is not in the cache.

    Returns the directory, and the commit of a snapshot; None for what is no model of the hub.

    Args:
        revision: commit, branch or tag of a model of the hub; None is its main branch.
        with_code: whether to download Python files too.

    Raises:
        InputError: there is neither, or a directory and a revision.
    """
    if Path(name).is_dir():
        if revision is not None:
            raise InputError(f"{name} is a directory; --revision {revision} is for models of the hub")
        return Path(name), None
    from huggingface_hub import snapshot_download  # late: directories do not need it
    from huggingface_hub.errors import HFValidationError

    patterns = ["config.json", *WEIGHT_PATTERNS, *COMPANIONS, *(["*.py"] if with_code else [])]
    try:
        snapshot = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (OSError, HFValidationError) as error:
        what = f"{name!r} at revision {revision!r}" if revision else repr(name)
        raise InputError(
            f"{what} is neither a directory nor a model that can be downloaded from the hub ({error})"
        ) from None
    return snapshot, snapshot.name  # the cache names the directory of a snapshot after its commit
