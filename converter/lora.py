"""A LoRA adapter in PEFT's format: read and checked whole, then merged into one weight at a time.

W + scale * B @ A, with scale = alpha / rank, or alpha / sqrt(rank) where use_rslora is set. The masks were learned on
that sum, so it comes before they are folded in. What changes the model in any other way (DoRA, trained embeddings,
initial values taken out of the base weights) is refused: merging only A and B would give a different model.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from converter.checkpoint import Checkpoint
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import read_json
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.headers import ELEMENT_BYTES
from pruned_vllm.formats.weights import ADAPTER_CONFIG, open_safetensors

WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"
KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<half>[AB])(\.default)?\.weight")
BASE_COPY = re.compile(r"base_model\.model\.(?P<module>.+?)(\.base_layer)?\.weight")

# Initial values that leave the base weights alone. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA subtract theirs from them.
PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
CHECKED_KEYS = {
    "alpha_pattern",
    "bias",
    "init_lora_weights",
    "lora_alpha",
    "peft_type",
    "r",
    "rank_pattern",
    "use_rslora",
}
# Of training, or about which modules have an adapter, which the tensors tell.
NEUTRAL_KEYS = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "target_modules",
    "task_type",
}
USE_PEFT = "merge it into the base model with PEFT (merge_and_unload) and set lora_adapter to null"


@dataclass(frozen=True)
class LoraPair:
    """What is added to one weight: scale * B @ A. The keys are those of the adapter's file."""

    key_a: str  # [rank, in]
    key_b: str  # [out, rank]
    rank: int
    scale: float


@dataclass(frozen=True)
class LoraAdapter:
    """An adapter that fits the model.

    Attributes:
        shard: the open safetensors file.
        pairs: by full name of the weight that each changes.
    """

    shard: Any
    pairs: dict[str, LoraPair]

    @property
    def ranks(self) -> list[int]:
        """The different ranks, ascending."""
        return sorted({pair.rank for pair in self.pairs.values()})

    def merge(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The sum in float32 (float64 for float64): the caller casts, once, after the masks are folded in."""
        pair = self.pairs[name]
        dtype = torch.promote_types(weight.dtype, torch.float32)
        a, b = (self.shard.get_tensor(key).to(dtype) for key in (pair.key_a, pair.key_b))
        return torch.addmm(weight.to(dtype), b, a, alpha=pair.scale)

    @classmethod
    def read(cls, directory: Path, checkpoint: Checkpoint, dense: ModelGeometry) -> "LoraAdapter":
        """Reads an adapter for a dense model of this geometry.

        Args:
            checkpoint: the dense weights; PEFT stores copies of some beside the adapter, which must equal these.

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

        scaling = collect(_Scaling.read, directory / ADAPTER_CONFIG)
        shard = collect(_open, directory)
        halves: dict[str, tuple[str, str]] = {}
        if shard is not None:
            halves, found = _find_halves(shard, checkpoint, dense)
            problems += found
        shapes = dense.tensor_shapes()
        for name, keys in halves.items():
            problems += _pair_problems(shard, keys, name, shapes[name], scaling)
        if problems:
            raise InputError(f"The LoRA adapter in {directory} cannot be merged:", problems)
        return cls(shard, {name: LoraPair(*keys, *scaling.rank_and_scale(name)) for name, keys in halves.items()})


@dataclass(frozen=True)
class _Scaling:
    """The numbers of adapter_config.json. A pattern maps a regular expression for module names to a number."""

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]

    @classmethod
    def read(cls, path: Path) -> "_Scaling":
        config = read_json(path)
        problems = [f"{path.name}: {problem}" for problem in _config_problems(config)]
        if problems:
            raise InputError(f"{path}:", problems)
        return cls(
            rank=config["r"],
            alpha=config["lora_alpha"],
            use_rslora=bool(config.get("use_rslora")),
            rank_pattern=config.get("rank_pattern") or {},
            alpha_pattern=config.get("alpha_pattern") or {},
        )

    def rank_of(self, name: str) -> int:
        """The rank that the adapter of a weight must have."""
        return _first_match(self.rank_pattern, name, self.rank)

    def rank_and_scale(self, name: str) -> tuple[int, float]:
        """For a weight whose adapter has been found to have this rank."""
        rank, alpha = self.rank_of(name), _first_match(self.alpha_pattern, name, self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _module_expression(pattern: str) -> str:
    """As PEFT reads a key of rank_pattern: the end of a module name, from a dot or the start on."""
    return rf"(.*\.)?({pattern})$"


def _first_match(pattern: dict[str, Any], name: str, default: Any) -> Any:
    module = name.removesuffix(".weight")
    return next((value for key, value in pattern.items() if re.match(_module_expression(key), module)), default)


def _config_problems(config: dict[str, Any]) -> list[str]:
    if config.get("peft_type") != "LORA":
        return [f"peft_type is {config.get('peft_type')!r}; only 'LORA' is merged: {USE_PEFT}"]
    problems = _number_problems(config, "r", "rank_pattern", _is_rank, "a whole number of at least 1")
    problems += _number_problems(config, "lora_alpha", "alpha_pattern", _is_alpha, "a finite number")
    if not isinstance(config.get("use_rslora"), bool | None):
        problems.append(f"use_rslora is {config['use_rslora']!r}; it must be true or false")
    init = config.get("init_lora_weights")
    if not isinstance(init, bool | None) and str(init).lower() not in PLAIN_INITS:
        problems.append(
            f"init_lora_weights is {init!r}, which changed base weights that the adapter does not hold; save it with "
            "PEFT's path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        )
    if config.get("bias", "none") != "none":
        problems.append(f"bias is {config['bias']!r}; trained biases are not merged: {USE_PEFT}")
    # Whatever else is set, also what a later PEFT adds, may change what the adapter computes.
    for key in sorted(set(config) - CHECKED_KEYS - NEUTRAL_KEYS):
        if config[key]:
            problems.append(f"{key} is {config[key]!r}; only plain LoRA is merged: {USE_PEFT}")
    return problems


def _number_problems(
    config: dict[str, Any], key: str, pattern_key: str, is_number: Callable[[Any], bool], wanted: str
) -> list[str]:
    """Problems with one number and with the pattern that replaces it for some modules."""
    problems, pattern = [], config.get(pattern_key) or {}
    if not isinstance(pattern, dict):
        problems, pattern = [f"{pattern_key} is {pattern!r}; it must be a mapping of module names to numbers"], {}
    numbers = {key: config.get(key)} | {f"{pattern_key}[{module!r}]": value for module, value in pattern.items()}
    problems += [
        f"{where} is {value!r}; it must be {wanted}" for where, value in numbers.items() if not is_number(value)
    ]
    for module in pattern:
        try:
            re.compile(_module_expression(module))
        except (re.error, OverflowError, RecursionError) as error:
            problems.append(f"{pattern_key}[{module!r}]: no regular expression: {error}")
    return problems


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_alpha(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= torch.finfo().max


def _open(directory: Path) -> Any:
    path = directory / WEIGHTS_FILE
    if not path.exists() and (directory / PICKLED_FILE).exists():
        raise InputError(
            f"{directory / PICKLED_FILE}: pickled weights are never read; save the adapter as safetensors, "
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
        name = f"{match['module']}.weight" if match else None
        if name is None:
            problems += _other_key_problems(shard, key, checkpoint)
        elif name == "lm_head.weight" and dense.tie_word_embeddings:
            problems.append(f"{key}: lm_head is tied to the embedding, which must not change with it; untie them first")
        elif name == "model.embed_tokens.weight" or len(shapes.get(name, ())) != 2:
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
    shard: Any, keys: tuple[str, str], name: str, shape: tuple[int, ...], scaling: _Scaling | None
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
        elif bad := int((~shard.get_tensor(key).isfinite()).sum()):
            problems.append(f"{key}: {bad:,} of {math.prod(expected):,} values are NaN or infinite")
    return problems
