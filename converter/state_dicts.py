"""Weights in files of torch.save: pytorch_model.bin, alone or in shards with an index, and other state dicts.

They are pickles, and nothing in them is run (see converter/pickles.py). Nor do they stand in for other weights: where
safetensors lie beside them, both are named and none is read.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from converter.base_model import CONFIG_FILES, find_base_model
from converter.checkpoint import DTYPES, Checkpoint
from converter.hidden import EMBEDDING, LM_HEAD
from converter.pickles import Stub
from converter.source import Request
from converter.torch_files import is_state_dict, is_torch_file, read_torch_file, texts_at_start
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import is_inside, read_json
from pruned_vllm.formats.config import read_config
from pruned_vllm.formats.families import find_family
from pruned_vllm.formats.tensors import canonical_name
from pruned_vllm.formats.weights import ADAPTER_CONFIG, INDEX_FILE, SINGLE_FILE, has_weight_files

PICKLED_FILE, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
ADAPTER_FILE = "adapter_model.bin"
WRAPPERS = ("state_dict", "model", "module")  # keys under which training code puts a state dict beside other things


def recognise_state_dict(path: Path) -> str | None:
    """What says that `path` is a model whose weights are pickled; nothing but the start of a pickle is looked at."""
    if path.is_dir():
        found = [name for name in (PICKLED_FILE, PICKLED_INDEX) if (path / name).is_file()]
        is_model = (path / "config.json").is_file() and bool(found)
        is_model = is_model and (PICKLED_INDEX in found or _starts_with_weights(path / PICKLED_FILE))
        return f"config.json beside {' and '.join(found)}" if is_model else None
    return "a state dict of torch.save" if is_torch_file(path) and _starts_with_weights(path) else None


def _starts_with_weights(file: Path) -> bool:
    return any(text.endswith("embed_tokens.weight") for text in texts_at_start(file))


def read_weights(request: Request) -> tuple[Checkpoint, list[str]]:
    """The weights in the file or directory INPUT with the config.json beside, and notes on what was read.

    Raises:
        InputError: there are none or several, they are no state dicts, or there is no config.json.
    """
    files = _files(request.path)
    directory = request.path if request.path.is_dir() else request.path.parent
    if not (directory / "config.json").is_file():
        directory, _ = find_base_model(request, "weights, but no config.json is beside them", CONFIG_FILES)
    config = read_config(directory)
    parts = {file: read_state_dict(file) for file in files}
    counts = Counter(name for tensors in parts.values() for name in tensors)
    if twice := sorted(name for name, count in counts.items() if count > 1):
        raise InputError(f"{request.path} holds these tensors in more than one file; keep one of each:", twice)
    if counts and all(".lora_" in name for name in counts):
        raise InputError(
            f"{files[0]} holds a LoRA adapter and no weights, as the tuning after LLM-Pruner writes: name it "
            f"{ADAPTER_FILE}, put it and {ADAPTER_CONFIG} beside the pickled model, and give that --from llm-pruner"
        )
    left_out = tied_copies({name: tensor for tensors in parts.values() for name, tensor in tensors.items()}, config)
    kept = {
        file: {name: tensor for name, tensor in tensors.items() if name not in left_out}
        for file, tensors in parts.items()
    }
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    note = f"The weights are pickled: {files[0].name}{more}. Nothing in it was run."
    return Checkpoint(directory, config, {}).replaced(kept), [note]


def read_state_dict(file: Path) -> dict[str, torch.Tensor]:
    """Tensors by the names that a model's files have.

    Raises:
        InputError: the file cannot be read, or holds something else.
    """
    content = read_torch_file(file)
    if isinstance(content, dict) and not is_state_dict(content):
        content = next((content[key] for key in WRAPPERS if is_state_dict(content.get(key))), content)
    if not is_state_dict(content):
        raise InputError(f"{file} holds no state dict, which is tensors by their names, but {describe(content)}")
    prefix = "module." if all(name.startswith("module.") for name in content) else ""
    if odd := [name for name in content if not name.isprintable()]:
        raise InputError(f"{file} holds {len(odd):,} tensors whose names are none of a model: {odd[0][:80]!r} ...")
    tensors = {canonical_name(name.removeprefix(prefix)): tensor for name, tensor in content.items()}
    if len(tensors) < len(content):
        raise InputError(f"{file} holds tensors twice, with and without 'model.' before their names; keep one of each")
    return tensors


def describe(content: Any) -> str:
    """What a pickle holds, for messages."""
    if isinstance(content, Stub):
        return f"an object of the class {f'{content.module}.{content.name}'!r}; --from llm-pruner reads whole models"
    if isinstance(content, dict):
        return f"a dictionary with {', '.join(ascii(key)[:80] for key in list(content)[:5] if isinstance(key, str))}"
    return f"a {type(content).__name__}"


def tied_copies(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> set[str]:
    """The names of tensors that a model with tied embeddings has twice: torch.save writes lm_head too.

    Raises:
        InputError: lm_head differs from the embedding.
    """
    is_tied = find_family(config).with_defaults(config).get("tie_word_embeddings")
    if not is_tied or not {EMBEDDING, LM_HEAD} <= set(tensors):
        return set()
    if not torch.equal(tensors[EMBEDDING], tensors[LM_HEAD]):
        raise InputError(f"{LM_HEAD} differs from {EMBEDDING}, but tie_word_embeddings is true in the configuration")
    return {LM_HEAD}


class LoadedShard:
    """Tensors with the interface of an open safetensors file."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def keys(self) -> list[str]:
        return list(self._tensors)

    def get_tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def get_slice(self, name: str) -> "LoadedSlice":
        return LoadedSlice(self._tensors[name])


class LoadedSlice:
    """The header of a tensor, as safetensors gives it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        return DTYPES.get(self._tensor.dtype, str(self._tensor.dtype))


def _files(path: Path) -> list[Path]:
    """The pickled weights that INPUT is or holds. Raises InputError."""
    if not path.is_dir():
        if not is_torch_file(path):
            raise InputError(f"{path} is no directory; give the model directory, or a file of torch.save")
        return [path]
    found = [name for name in (PICKLED_FILE, PICKLED_INDEX) if (path / name).is_file()]
    refuse_two_formats(path)
    if not found:
        raise InputError(f"{path} holds neither safetensors nor {PICKLED_FILE} nor {PICKLED_INDEX}")
    if (path / ADAPTER_CONFIG).exists():
        raise InputError(
            f"{path / ADAPTER_CONFIG}: Transformers would add this adapter to the weights without a word; merge it "
            "into them with PEFT (merge_and_unload), or move it away"
        )
    if len(found) > 1:
        raise InputError(f"{path} holds both {PICKLED_FILE} and {PICKLED_INDEX}; delete the one that is not meant")
    if found == [PICKLED_FILE]:
        return [path / PICKLED_FILE]
    weight_map = read_json(path / PICKLED_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(is_inside(file) for file in weight_map.values()):
        raise InputError(f"{path / PICKLED_INDEX} has no weight_map, or names files outside of its directory")
    return [path / name for name in sorted(set(weight_map.values()))]


def refuse_two_formats(path: Path) -> None:
    """Raises InputError where a directory has weights as safetensors and pickled ones: which are meant?"""
    pickled = [name for name in (PICKLED_FILE, PICKLED_INDEX) if (path / name).is_file()]
    safe = [name for name in (SINGLE_FILE, INDEX_FILE) if (path / name).is_file()]
    if pickled and has_weight_files(path):
        raise InputError(
            f"{path} holds {' and '.join(safe)} as well as {' and '.join(pickled)}, and they may differ; move away the "
            "ones that are not meant"
        )
