"""What convert-pruned export reads: a model that convert-pruned wrote, or a stock one, in float weights."""

from pathlib import Path

from converter.checkpoint import Checkpoint
from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.config import read_config
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.headers import dense_problems
from pruned_vllm.formats.masked import MASKS_FILE


def read_exportable(directory: Path, if_quantized: str) -> tuple[Checkpoint, ModelGeometry]:
    """The weights and sizes of a model that is ready to be served.

    Args:
        if_quantized: what the user is told to do with a quantized one.

    Raises:
        InputError: it holds masks that are not applied, is quantized, or has tensors that do not fit its config.json.
    """
    if (directory / MASKS_FILE).exists():
        raise InputError(f"{directory} holds masks; convert it first, then export what that writes")
    config = read_config(directory)
    if "quantization_config" in config:
        raise InputError(f"{directory} is quantized{if_quantized}")
    geometry = ModelGeometry.from_config(config)
    checkpoint = Checkpoint.from_directory(directory)
    if problems := dense_problems(checkpoint.tensors, geometry):
        raise InputError(f"The tensors in {directory} do not fit its config.json:", problems)
    return checkpoint, geometry
