"""What a command might write into its output directory, and what a test finds there."""

from pathlib import Path

from pruned_vllm.common.directories import atomic_directory
from pruned_vllm.common.manifest import MANIFEST

WRITER = "test-command"
NAMES = ("config.json", "model-1.safetensors", "adapter/model.safetensors")


def write(out: Path, content: str, overwrite: bool = True) -> None:
    with atomic_directory(out, writer=WRITER, overwrite=overwrite) as directory:
        for name in NAMES:
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_text(content)


def content_of(out: Path) -> str:
    """What all files of one run hold. Raises AssertionError when they are not whole."""
    contents = {(out / name).read_text() for name in NAMES}
    assert len(contents) == 1, f"files of several runs: {contents}"
    assert (out / MANIFEST).is_file()
    return contents.pop()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())
