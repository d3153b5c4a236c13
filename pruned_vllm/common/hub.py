"""Models by name: a directory, or an id on the Hugging Face hub, of which one snapshot is taken.

huggingface_hub is imported late, so that this is pure Python for those who have directories.
"""

from collections.abc import Sequence
from pathlib import Path

from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import COMPANIONS

MODEL_FILES = ("config.json", "model*.safetensors", "model.safetensors.index.json", *COMPANIONS)


def locate_model(name: str, revision: str | None = None, extra: Sequence[str] = ()) -> tuple[Path, str | None]:
    """The directory of a model and, if it comes from the hub, the commit that the directory holds.

    Files are downloaded unless they lie in the cache. Whoever reads them from the directory reads one state of the
    model, even if it is changed on the hub meanwhile.

    Args:
        name: directory or hub id.
        revision: branch, tag or commit of a hub id; None is its main branch.
        extra: patterns of files to have besides MODEL_FILES.

    Raises:
        InputError: it is neither a directory nor a model that can be downloaded, or a directory with a revision.
    """
    directory = Path(name)
    if directory.is_dir():
        if revision is not None:
            raise InputError(f"{name} is a directory, which has no --revision; that is for models of the hub")
        return directory, None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        snapshot = Path(snapshot_download(name, revision=revision, allow_patterns=[*MODEL_FILES, *extra]))
    except (OSError, HFValidationError) as error:
        what = f"{name!r} at revision {revision!r}" if revision else repr(name)
        raise InputError(f"{what} is neither a directory nor a model that can be downloaded ({error})") from None
    return snapshot, snapshot.name  # the cache calls a snapshot's directory by its commit
