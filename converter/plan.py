"""Decides everything about a conversion before anything is written, and refuses what cannot be done."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from converter.checkpoint import FLOAT_DTYPES, Checkpoint, has_weights
from converter.fold import Cut, cut_layer
from converter.masks import PRUNING_FILE, PruningInfo, read_masks
from pruned_vllm.errors import InputError
from pruned_vllm.geometry import LayerGeometry, ModelGeometry

# Buffers that old checkpoints carry; every loader computes them itself.
DROPPED_SUFFIXES = (".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached")

ELEMENT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class Plan:
    """A conversion that can be done.

    Attributes:
        checkpoint: the dense weights.
        info: pruning.json.
        dense, pruned: geometries before and after.
        cuts: by full tensor name; a tensor that is not named is copied.
    """

    checkpoint: Checkpoint
    info: PruningInfo
    dense: ModelGeometry
    pruned: ModelGeometry
    cuts: dict[str, Cut]

    @property
    def num_bytes(self) -> int:
        """Bytes of the converted tensors."""
        return self.bytes_of(self.pruned)

    def bytes_of(self, geometry: ModelGeometry) -> int:
        """Bytes of the tensors of `geometry` in the dtypes of the checkpoint."""
        return sum(
            ELEMENT_BYTES[self.checkpoint.dtypes[name]] * torch.Size(shape).numel()
            for name, shape in geometry.tensor_shapes().items()
        )

    def config(self) -> dict[str, Any]:
        """The converted config.json."""
        config = dict(self.checkpoint.config)
        config.pop("auto_map", None)  # code shipped with the dense model does not know the new shapes
        return self.pruned.to_config(config) | {
            "pruning": {
                "format_version": 1,
                "method": self.info.method,
                "source": self.info.base_model,
                "alignment": 1,
                "sizes": {
                    "parameters": [self.dense.num_parameters, self.pruned.num_parameters],
                    "num_key_value_heads": [self.dense.num_key_value_heads, self.pruned.num_key_value_heads],
                },
            }
        }


def make_plan(directory: Path, base_model: str | None = None) -> Plan:
    """Reads the masked checkpoint in `directory` and checks all of it.

    Args:
        base_model: directory or hub id that takes the place of the one in pruning.json.

    Raises:
        InputError: with every problem of the first stage that has any (files, config, tensors and masks, geometry).
    """
    if not directory.is_dir():
        raise InputError(f"{directory} is not a directory; give the masked checkpoint that learn-masks wrote")
    info = PruningInfo.read(directory)
    checkpoint = Checkpoint(_find_weights(directory, base_model or info.base_model))
    if "quantization_config" in checkpoint.config:
        raise InputError(
            f"{checkpoint.directory} is quantized; masks fold into float weights only: quantize afterwards"
        )
    dense = ModelGeometry.from_config(checkpoint.config)
    if not dense.dense.has_even_groups or set(dense.layers) != {dense.dense}:
        raise InputError(f"{checkpoint.directory} is pruned already; masks are for a dense model")

    problems = _tensor_problems(checkpoint, dense)
    masks = None
    try:
        masks = read_masks(directory, dense)
    except InputError as error:
        problems.append(str(error))
    if problems:
        raise InputError(f"{directory} cannot be converted:", problems)

    layers: list[LayerGeometry] = []
    cuts: dict[str, Cut] = {}
    for index, layer_masks in enumerate(masks):
        layer, its_cuts = cut_layer(dense.dense, dense.head_dim, layer_masks, info.channel_mask_site)
        layers.append(layer)
        cuts |= {f"model.layers.{index}.{name}": cut for name, cut in its_cuts.items()}
    _check_supported(layers)
    return Plan(checkpoint, info, dense, dense.with_layers(tuple(layers)), cuts)


def _find_weights(directory: Path, base_model: str | None) -> Path:
    """The directory of the dense weights: the masked checkpoint itself, or its base model."""
    if has_weights(directory):
        return directory
    if base_model is None:
        raise InputError(
            f"{directory} holds no safetensors weights and {PRUNING_FILE} names no base_model; "
            "give the dense model with --base-model"
        )
    for candidate in (directory / base_model, Path(base_model)):
        if candidate.is_dir():
            return candidate
    try:
        return Path(
            snapshot_download(base_model, allow_patterns=["*.safetensors", "*.json", "*.model", "*.jinja", "*.txt"])
        )
    except (OSError, HFValidationError) as error:
        raise InputError(
            f"base_model {base_model!r} is neither a directory nor a model that can be downloaded ({error}); "
            "give the dense model with --base-model"
        ) from None


def _tensor_problems(checkpoint: Checkpoint, dense: ModelGeometry) -> list[str]:
    """Compares the headers of the shards with what config.json promises."""
    expected = dense.tensor_shapes()
    problems = [f"{name} {list(shape)}: missing" for name, shape in expected.items() if name not in checkpoint.shapes]
    for name, shape in checkpoint.shapes.items():
        if name in expected:
            if shape != expected[name]:
                problems.append(f"{name}: the file has {list(shape)}, config.json says {list(expected[name])}")
            if checkpoint.dtypes[name] not in FLOAT_DTYPES:
                problems.append(f"{name}: dtype {checkpoint.dtypes[name]}; only {sorted(FLOAT_DTYPES)} can be folded")
        elif name == "lm_head.weight":  # config.json says it is tied to the embedding
            if shape != expected["model.embed_tokens.weight"] or not torch.equal(
                checkpoint.read(name), checkpoint.read("model.embed_tokens.weight")
            ):
                problems.append(
                    f"{name}: differs from model.embed_tokens.weight, but tie_word_embeddings is true; correct either"
                )
        elif not name.endswith(DROPPED_SUFFIXES):
            problems.append(f"{name} {list(shape)}: not a tensor of {dense.family.architecture}; it would be lost")
    return problems


def _check_supported(layers: list[LayerGeometry]) -> None:
    problems = []
    for index, layer in enumerate(layers):
        if layer.skip:
            problems.append(f"layer {index}: the masks remove all of its {' and '.join(layer.skip)}; keep one unit")
        if not layer.has_even_groups:
            problems.append(
                f"layer {index}: its KV heads keep unequal numbers of query heads, "
                f"{list(layer.query_heads_per_kv_head)}; keep equally many in each, e.g. learn with --gqa tied"
            )
    if problems:
        raise InputError("This release cannot serve what the masks leave:", problems)
