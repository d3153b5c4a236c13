"""Errors of a full or failing disk become OSError, whichever library met them."""

from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

PYTORCH_WRITER = ("PytorchStreamWriter", "inline_container")  # what its messages name


@contextmanager
def writing() -> Iterator[None]:
    """Runs a block that writes files; OSError where safetensors or PyTorch, which raise others, cannot write theirs.

    So the commands end with a message and exit code 2, and no other process waits for this one.
    """
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"cannot write: {error}") from error
    except RuntimeError as error:
        if not any(name in str(error) for name in PYTORCH_WRITER):
            raise
        raise OSError(f"cannot write, the disk is full or failing: {error}") from error
