"""What the headers of a model's weight files say: the tensors, and whether they are those that config.json promises.

Pure Python: no tensor is loaded.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import read_json
from pruned_vllm.formats.config_values import LARGEST_COUNT, natural
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.tensors import IGNORED_SUFFIXES, canonical_name
from pruned_vllm.formats.weights import INDEX_FILE, find_weight_files, open_safetensors, read_header
from pruned_vllm.formats.wrappers import DRAFT, OTHER_TOWERS

DRAFT_LAYERS = "num_nextn_predict_layers"
_LEFT_OUT = (*OTHER_TOWERS, DRAFT)  # prefixes of tensors that are not the language model's
ELEMENT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # the dtypes that masks can be folded into

# How Transformers 5 holds experts in memory; its save_pretrained splits them, but other savers may not.
_FUSED_EXPERTS = re.compile(r"\.experts\.(gate_up_proj|down_proj|w1|w2|w3)(\.weight)?$")
_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.")
_EXPERT = re.compile(r"\.experts\.(\d{1,9})\.")
_CHUNK_BYTES = 1 << 20
_LAST_BIASES = (".o_proj.bias", ".down_proj.bias")
_NO_SUCH_BIAS = (
    ". FLAP and its kind make up for what they cut with such a bias, but config.json has no key for it in this family, "
    "so neither Transformers nor vLLM would read it"
)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk.

    Attributes:
        file: a safetensors file, or another that it was taken out of.
        key: its name in the file.
        dtype: in the words of safetensors ("BF16").
        span: where its content begins and ends in the file, in bytes; (0, 0) where it is in none.
        strides: along each dimension, how many numbers neighbours are apart there, the first number of all being at
            the beginning of `span`; () where they lie one after another.
        packed: where the numbers are, if they are stored as MXFP4; `dtype` is then what they are widened to.
        is_zeros: not stored at all, but zeros in the dtype of what is; see pruned_vllm/formats/biases.py.
    """

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str
    span: tuple[int, int] = (0, 0)
    strides: tuple[int, ...] = ()
    packed: "PackedRows | None" = None
    is_zeros: bool = False

    @property
    def num_bytes(self) -> int:
        """Of its numbers, without what lies between them; of packed ones as they are widened."""
        if self.packed is not None:
            return ELEMENT_BYTES[self.dtype] * math.prod(self.shape)
        length = self.span[1] - self.span[0]
        return length // spread(self.shape, self.strides) * math.prod(self.shape) if self.strides else length


@dataclass(frozen=True)
class PackedRows:
    """Rows of 4-bit numbers in MXFP4: 32 of them in 16 bytes share a scale, an exponent of 2.

    Attributes:
        blocks: [stored rows, columns / 2], a byte for two numbers.
        scales: [stored rows, columns / 32], a byte each.
        first, step: row r is the stored row first + step * r.
    """

    blocks: StoredTensor
    scales: StoredTensor
    first: int
    step: int


def spread(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """How many numbers there are from the first to the last one of a tensor with strides."""
    return 1 + sum((count - 1) * stride for count, stride in zip(shape, strides, strict=True))


def stored_tensors(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file by their names there. Raises InputError."""
    return {
        key: StoredTensor(file, key, tuple(entry["shape"]), entry["dtype"], entry["data_offsets"])
        for key, entry in read_header(file).items()
    }


def read_headers(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of the weights of a model directory, by the name that `ModelGeometry.tensor_shapes` gives it.

    Fused ones stay as they are stored. Left out are the other towers of a multimodal model, and layers that draft.

    Raises:
        InputError: what `find_weight_files` refuses; or with all problems of the index and of the files.
    """
    tensors: dict[str, StoredTensor] = {}
    problems: list[str] = []
    files = find_weight_files(directory)
    for file in files:
        try:
            found = checked_tensors(file)
        except InputError as error:
            problems.append(str(error))
            continue
        for key, tensor in found.items():
            if key.startswith(_LEFT_OUT):
                continue
            name = canonical_name(key)
            if name in tensors:
                problems.append(f"{name}: in {tensors[name].file.name} and again in {file.name}; keep one")
            tensors[name] = tensor
    if not problems and (directory / INDEX_FILE).is_file():
        weight_map = read_json(directory / INDEX_FILE)["weight_map"]
        problems = [
            f"{key}: the index says it is in {file}, but it is not"
            for key, file in weight_map.items()
            if directory / file in files
            and not key.startswith(_LEFT_OUT)
            and getattr(tensors.get(canonical_name(key)), "file", None) != directory / file
        ]
    if problems:
        raise InputError(f"The weights in {directory} cannot be read:", problems)
    return tensors


def has_draft_layers(directory: Path) -> bool:
    """Whether the weights of a model directory are those of layers that draft tokens, too. Raises InputError."""
    return any(key.startswith(DRAFT) for file in find_weight_files(directory) for key in checked_tensors(file))


def num_draft_layers(config: Mapping[str, Any]) -> int:
    """Layers behind the last one that config.json counts apart: they draft tokens (multi-token prediction), and nothing
    else in the model needs them. Raises ValueError for what is no number."""
    return natural(config, DRAFT_LAYERS, 0)


def without_draft_layers(config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """`tensors` without those of layers that draft tokens. Raises InputError for sizes that are no numbers."""
    try:
        count, first = num_draft_layers(config), natural(config, "num_hidden_layers", 0)
    except ValueError as error:
        raise InputError(f"config.json: {error}") from None
    prefixes = tuple(f"model.layers.{first + index}." for index in range(min(count, LARGEST_COUNT)))
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefixes)}


def checked_tensors(file: Path) -> dict[str, StoredTensor]:
    """`stored_tensors` of a file that the library finds sound. It is read once, whoever asks. Raises InputError."""
    return _checked_tensors(file, _stamp(file))


@lru_cache(maxsize=1024)
def _checked_tensors(file: Path, stamp: tuple[int, ...]) -> dict[str, StoredTensor]:
    open_safetensors(file)  # the library that loaders use decides whether it is one; it tells no offsets
    return stored_tensors(file)


def _stamp(file: Path) -> tuple[int, ...]:
    """What is another number once a file was changed; nothing where there is no file."""
    try:
        facts = file.stat()
    except OSError:
        return ()
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


def dense_problems(tensors: Mapping[str, StoredTensor], dense: ModelGeometry) -> list[str]:
    """What keeps these tensors from being a dense model of this geometry whose weights masks can be folded into."""
    if fused := sorted(name for name in tensors if _FUSED_EXPERTS.search(name)):
        return [
            f"{fused[0]} and {len(fused) - 1} more hold all experts of a layer in one tensor; published checkpoints of "
            "this family have one for each expert: load the model with Transformers 5 and save_pretrained it"
        ]
    if problems := count_problems(tensors, dense):
        return problems
    expected = dense.tensor_shapes()
    problems = [f"{name} {list(shape)}: missing" for name, shape in expected.items() if name not in tensors]
    for name, tensor in tensors.items():
        if name in expected:
            if tensor.shape != expected[name]:
                problems.append(f"{name}: the file has {list(tensor.shape)}, config.json says {list(expected[name])}")
            if tensor.dtype not in ELEMENT_BYTES:
                problems.append(f"{name}: dtype {tensor.dtype}; only {sorted(ELEMENT_BYTES)} can be folded")
        elif name == "lm_head.weight":
            problems += _tied_lm_head_problems(tensors)
        elif not name.endswith(IGNORED_SUFFIXES):
            problems.append(
                f"{name} {list(tensor.shape)}: not a tensor of {dense.family.architecture}; it would be lost"
                f"{_NO_SUCH_BIAS if name.endswith(_LAST_BIASES) else ''}"
            )
    return problems


def count_problems(tensors: Iterable[str], geometry: ModelGeometry) -> list[str]:
    """Layers and experts that the files and config.json count differently; layers and experts without tensors apart.

    Cheap whatever config.json says, and one line: comparing the names would take one for every tensor.
    """
    names, problems = list(tensors), []
    layers = range(len(geometry.layers), 0, -1)
    promised = next((count for count in layers if geometry.layer_tensor_shapes(count - 1)), 0)
    if (found := _count(_LAYER, names)) != promised:
        problems.append(f"config.json says {promised:,} layers, the files have {found:,}")
    has_bias = geometry.family.experts is not None and geometry.family.experts.bias
    last = (
        max((expert for expert, width in enumerate(layer.expert_intermediate_sizes) if width or has_bias), default=-1)
        for layer in set(geometry.layers)
    )
    constant = (max(layer.constant_experts, default=-1) for layer in geometry.layers)
    promised = max((*last, *constant), default=-1) + 1
    if (found := _count(_EXPERT, names)) != promised:
        problems.append(f"config.json says {promised:,} experts, the files have {found:,}")
    return problems


def _count(pattern: re.Pattern, names: list[str]) -> int:
    """One more than the largest number that the pattern finds."""
    return max((int(match[1]) for name in names if (match := pattern.search(name))), default=-1) + 1


def _tied_lm_head_problems(tensors: Mapping[str, StoredTensor]) -> list[str]:
    """A tied lm_head may be stored too, but only as a copy of the embedding."""
    lm_head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if embedding not in tensors:  # reported as missing
        return []
    if _same_content(tensors[lm_head], tensors[embedding]):
        return []
    return [f"{lm_head}: differs from {embedding}, but tie_word_embeddings is true in config.json; correct either"]


def _same_content(first: StoredTensor, second: StoredTensor) -> bool:
    """Whether two tensors in files are equal, byte by byte; what is in no file equals nothing."""
    if (first.shape, first.dtype) != (second.shape, second.dtype) or first.span == (0, 0) or second.span == (0, 0):
        return False
    (start, end), (other_start, _) = first.span, second.span
    with first.file.open("rb") as file, second.file.open("rb") as other:
        file.seek(start)
        other.seek(other_start)
        lengths = (min(_CHUNK_BYTES, end - place) for place in range(start, end, _CHUNK_BYTES))
        return all(file.read(length) == other.read(length) for length in lengths)
