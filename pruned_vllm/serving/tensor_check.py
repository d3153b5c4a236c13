"""Compares the tensors of a directory with its config.json before vLLM starts a process.

A directory is checked from the headers of its files, so that the user reads the sentence and not that some worker
failed; whatever is loaded is checked again, tensor by tensor (`base.py`).
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.quantization import Quantization
from pruned_vllm.formats.tensor_check import TensorCheck
from pruned_vllm.formats.tensors import canonical_name
from pruned_vllm.formats.weights import find_weight_files, open_safetensors

if TYPE_CHECKING:  # this file is imported while the plugin registers, before vLLM may be set up
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.pruned_vllm")  # under vLLM's own logging configuration

# Values of --load-format that read the safetensors of a model directory as they are.
SAFETENSORS_FORMATS = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer")


def check_directory(
    vllm_config: "VllmConfig", geometry: ModelGeometry, quantization: Quantization | None
) -> frozenset[str]:
    """Checks the files that vLLM will load, where they lie in a directory.

    Returns:
        the names of the tensors; none where nothing was checked.

    Raises:
        InputError: files that are missing, cannot be read or that other readers would not take, or tensors that do not
            fit config.json.
    """
    directory = Path(vllm_config.model_config.model)
    if not directory.is_dir() or vllm_config.load_config.load_format not in SAFETENSORS_FORMATS:
        return frozenset()
    check, names = TensorCheck(geometry, quantization), set()
    for path in find_weight_files(directory):
        with open_safetensors(path) as file:  # reads the header alone
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_slice(name)
                check.accepts(canonical_name(name), tuple(tensor.get_shape()), tensor.get_dtype())
                names.add(canonical_name(name))
    check.finish(str(directory))
    if modules := check.unjudged:
        logger.warning(
            "%d modules, %s first, are stored in a way that vLLM alone can judge: damage of theirs may go unnoticed",
            len(modules),
            modules[0],
        )
    return frozenset(names)
