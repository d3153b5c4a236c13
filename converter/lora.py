"""A LoRA adapter in PEFT's format: read and checked whole, then merged into one weight at a time.

W + scale * B @ A, with scale = alpha / rank, or alpha / sqrt(rank) where use_rslora is set. The masks were learned on
that sum, so it comes before they are folded in. What changes the model in any other way (DoRA, trained embeddings,
initial values taken out of the base weights) is refused: merging only A and B would give a different model.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from converter.checkpoint import Checkpoint
from converter.lora_config import USE_PEFT, LoraScaling
from converter.mask_values import not_finite
from converter.state_dicts import ADAPTER_FILE, LoadedShard, read_state_dict
from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.family import Family
from pruned_vllm.formats.fused import parts_of
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.headers import ELEMENT_BYTES
from pruned_vllm.formats.tensors import Shapes
from pruned_vllm.formats.weights import ADAPTER_CONFIG, open_safetensors

WEIGHTS_FILE = "adapter_model.safetensors"
KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<half>[AB])(\.default)?\.weight")
BASE_COPY = re.compile(r"base_model\.model\.(?P<module>.+?)(\.base_layer)?\.weight")


@dataclass(frozen=True)
class LoraPair:
    """What is added to one weight: scale * B @ A. The keys are those of the adapter's file.

    `rows` are those of B; the others belong to other parts of a fused projection.
    """

    key_a: str  # [rank, in]
    key_b: str  # [out, rank]
    rows: slice
    rank: int
    scale: float


@dataclass(frozen=True)
class LoraAdapter:
    """An adapter that fits the model.

    Attributes:
        shard: the open safetensors file, or pickled tensors with its interface.
        pairs: by full name of the weight that each changes.
    """

    shard: Any
    pairs: dict[str, LoraPair]

    @property
    def names(self) -> set[str]:
        """Full names of the weights that change."""
        return set(self.pairs)

    @property
    def ranks(self) -> list[int]:
        """The different ranks, ascending."""
        return sorted({pair.rank for pair in self.pairs.values()})

    def describe(self) -> str:
        ranks = self.ranks
        rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        return f"LoRA adapter: {rank}, merged into {len(self.pairs):,} weights before the masks were folded in."

    def merge(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The sum in float32 (float64 for float64): the caller casts, once, after the masks are folded in."""
        pair = self.pairs[name]
        dtype = torch.promote_types(weight.dtype, torch.float32)
        a, b = (self.shard.get_tensor(key).to(dtype) for key in (pair.key_a, pair.key_b))
        return torch.addmm(weight.to(dtype), b[pair.rows], a, alpha=pair.scale)

    @classmethod
    def read(
        cls, directory: Path, checkpoint: Checkpoint, geometry: ModelGeometry, reads_pickles: bool = False
    ) -> "LoraAdapter":
        """Reads an adapter for a model of this geometry.

        Args:
            checkpoint: the model's weights; PEFT stores copies of some beside the adapter, which must equal these.
            reads_pickles: adapter_model.bin is read too, if there are no safetensors.

        Raises:
            InputError: with every problem of the configuration and of the tensors.
        """
        if not directory.is_dir():
            raise InputError(f"{directory}, the lora_adapter of pruning.json, is not a directory")
        problems: list[str] = []

        def collect(read: Callable, *args) -> Any:
            try:
                return read(*args)
            except InputError as error:
                problems.extend(error.problems or (str(error),))
                return None

        scaling = collect(LoraScaling.read, directory / ADAPTER_CONFIG)
        shard = collect(_open, directory, reads_pickles)
        halves: dict[str, tuple[str, str]] = {}
        if shard is not None:
            halves, found = _find_halves(shard, checkpoint, geometry)
            problems += found
        shapes, pairs = geometry.tensor_shapes(), dict[str, LoraPair]()
        for name, keys in halves.items():
            rows = _rows_of_parts(name, geometry.family, shapes)
            shape = sum(shapes[part][0] for part in rows), shapes[next(iter(rows))][1]
            problems += _pair_problems(shard, keys, name, shape, scaling)
            if scaling is not None:
                pairs |= {part: LoraPair(*keys, rows[part], *scaling.rank_and_scale(name)) for part in rows}
        if problems:
            raise InputError(f"The LoRA adapter in {directory} cannot be merged:", problems)
        return cls(shard, pairs)


def _rows_of_parts(name: str, family: Family, shapes: Shapes) -> dict[str, slice]:
    """The weights that a fused weight consists of, with their rows; of any other weight itself. Empty if unknown."""
    parts = parts_of(family, name) or [name]
    if not set(parts) <= shapes.keys():
        return {}
    ends = accumulate(shapes[part][0] for part in parts)
    return {part: slice(end - shapes[part][0], end) for part, end in zip(parts, ends, strict=True)}


def _open(directory: Path, reads_pickles: bool) -> Any:
    path = directory / WEIGHTS_FILE
    if not path.exists() and (directory / ADAPTER_FILE).exists():
        if reads_pickles:
            return LoadedShard(read_state_dict(directory / ADAPTER_FILE))
        raise InputError(
            f"{directory / ADAPTER_FILE}: pickled weights are never read; save the adapter as safetensors, "
            "save_pretrained(..., safe_serialization=True)"
        )
    return open_safetensors(path, "pt")


def _find_halves(
    shard: Any, checkpoint: Checkpoint, dense: ModelGeometry
) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """Weight name -> its keys (lora_A, lora_B) in the file; problems with all other keys."""
    shapes, problems = dense.tensor_shapes(), []
    found: dict[str, dict[str, str]] = {}
    for key in sorted(shard.keys()):
        match = KEY.fullmatch(key)
        if match is None:
            problems += _other_key_problems(shard, key, checkpoint)
            continue
        name = f"{match['module']}.weight"
        if name == "lm_head.weight" and dense.tie_word_embeddings:
            problems.append(f"{key}: lm_head is tied to the embedding, which must not change with it; untie them first")
        elif name == "model.embed_tokens.weight" or not _is_linear(_rows_of_parts(name, dense.family, shapes), shapes):
            problems.append(f"{key}: unknown key; {dense.family.architecture} has no linear layer {match['module']}")
        elif match["half"] in found.setdefault(name, {}):
            problems.append(f"{key}: the same as {found[name][match['half']]}; keep one")
        else:
            found[name][match["half"]] = key
    if not found and not problems:
        problems.append(f"{WEIGHTS_FILE}: holds no lora_A and lora_B; save the adapter again")
    halves = {}
    for name, keys in found.items():
        if len(keys) == 2:
            halves[name] = keys["A"], keys["B"]
        else:
            (key,) = keys.values()
            missing = "lora_B" if "A" in keys else "lora_A"
            problems.append(f"{key}: its {missing} is missing; save the adapter again")
    return halves, problems


def _is_linear(parts: Collection[str], shapes: Shapes) -> bool:
    return bool(parts) and all(len(shapes[part]) == 2 for part in parts)


def _other_key_problems(shard: Any, key: str, checkpoint: Checkpoint) -> list[str]:
    """PEFT stores lm_head too where that has an adapter: nothing is lost if it is the one of the model."""
    if "lora_embedding_" in key:
        return [f"{key}: adapters of the embedding are not merged; {USE_PEFT}"]
    match = BASE_COPY.fullmatch(key)
    name = f"{match['module']}.weight" if match else None
    if name not in checkpoint.tensors:
        return [f"{key}: unknown key; known: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight and so on"]
    if tuple(shard.get_slice(key).get_shape()) == checkpoint.tensors[name].shape and bool(
        (shard.get_tensor(key) == checkpoint.read(name)).all()
    ):
        return []
    return [f"{key}: differs from {name} in {checkpoint.directory}; the adapter is for another model, or {USE_PEFT}"]


def _pair_problems(
    shard: Any, keys: tuple[str, str], name: str, shape: tuple[int, ...], scaling: LoraScaling | None
) -> list[str]:
    """Args: shape: of the weight; scaling: None if the configuration cannot be used, which is reported elsewhere."""
    headers = [shard.get_slice(key) for key in keys]
    rank = scaling.rank_of(name) if scaling else next(iter(headers[0].get_shape()), 1)
    problems = []
    for key, header, expected in zip(keys, headers, ((rank, shape[1]), (shape[0], rank)), strict=True):
        if tuple(header.get_shape()) != expected:
            problems.append(
                f"{key}: shape {header.get_shape()}, but rank {rank} and {name} {list(shape)} need {list(expected)}"
            )
        elif header.get_dtype() not in ELEMENT_BYTES:
            problems.append(f"{key}: dtype {header.get_dtype()}; only {sorted(ELEMENT_BYTES)} can be merged")
        elif bad := not_finite(shard.get_tensor(key)):
            problems.append(f"{key}: {bad}")
    return problems
