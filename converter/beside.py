"""What lies beside the INPUT of an importer: the dense weights, or a tokenizer."""

from dataclasses import replace
from pathlib import Path

from converter.base_model import CONFIG_FILES, find_base_model
from converter.source import Request
from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.companions import has_tokenizer
from pruned_vllm.formats.weights import has_weight_files


def with_weights_beside(request: Request, directory: Path) -> Request:
    """The same request with the weights in `directory` as dense model, where the user named none."""
    if request.base_model is not None or not has_weight_files(directory):
        return request
    return replace(request, base_model=str(directory))


def companions_of(request: Request, directory: Path) -> Path:
    """Where the tokenizer and the like of a model in `directory` are: there, else in the model of --base-model."""
    if request.base_model is None or has_tokenizer(directory):
        return directory
    return find_base_model(request, "no tokenizer", CONFIG_FILES)[0]


def require_directory(path: Path) -> Path:
    """`path`, if it is a directory. Raises InputError."""
    if not path.is_dir():
        raise InputError(f"{path} is no directory; give the model directory, which holds config.json and the weights")
    return path
