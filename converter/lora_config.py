"""adapter_config.json of a LoRA adapter in PEFT's format: the numbers that the merge needs, all else checked.

`rank_pattern` and `alpha_pattern` map regular expressions for module names to numbers. They come with the adapter, so
they are foreign input, and matching some expressions takes twice as long with every character of a name. PEFT's own
tools write plain names ("layers.1.mlp.up_proj"), and its documentation shows names with an anchor. Accepted is more
than that, but nothing that can take long: no groups, and at most two repeats (`.*`, `[0-9]+`) of single characters.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import read_json
from pruned_vllm.formats.config_values import shown

_CHARACTER = r"(?:[\w-]|\\?\.|\\d|\[[\w-]+\])"  # a letter, any, a dot, a digit, or one of a set
_NAME = rf"\^?(?:{_CHARACTER}[*+]?)+\$?"
PATTERN = re.compile(rf"{_NAME}(?:\|{_NAME})*")  # alternatives, at the top level only
MAX_REPEATS = 2

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
class LoraScaling:
    """The numbers of adapter_config.json. A pattern maps a regular expression for module names to a number."""

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]

    @classmethod
    def read(cls, path: Path) -> "LoraScaling":
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
        return [f"peft_type is {shown(config.get('peft_type'))}; only 'LORA' is merged: {USE_PEFT}"]
    problems = _number_problems(config, "r", "rank_pattern", _is_rank, "a whole number of at least 1")
    problems += _number_problems(config, "lora_alpha", "alpha_pattern", _is_alpha, "a finite number")
    if not isinstance(config.get("use_rslora"), bool | None):
        problems.append(f"use_rslora is {shown(config['use_rslora'])}; it must be true or false")
    init = config.get("init_lora_weights")
    if not isinstance(init, bool | None) and str(init).lower() not in PLAIN_INITS:
        problems.append(
            f"init_lora_weights is {shown(init)}, which changed base weights that the adapter does not hold; save it "
            "with PEFT's path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        )
    if config.get("bias", "none") != "none":
        problems.append(f"bias is {shown(config['bias'])}; trained biases are not merged: {USE_PEFT}")
    # Whatever else is set, also what a later PEFT adds, may change what the adapter computes.
    for key in sorted(set(config) - CHECKED_KEYS - NEUTRAL_KEYS):
        if config[key]:
            problems.append(f"{key:.200} is {shown(config[key])}; only plain LoRA is merged: {USE_PEFT}")
    return problems


def _number_problems(
    config: dict[str, Any], key: str, pattern_key: str, is_number: Callable[[Any], bool], wanted: str
) -> list[str]:
    """Problems with one number and with the pattern that replaces it for some modules."""
    problems, pattern = [], config.get(pattern_key) or {}
    if not isinstance(pattern, dict):
        problems, pattern = [f"{pattern_key} is {shown(pattern)}; it must be a mapping of module names to numbers"], {}
    numbers = [(key, config.get(key)), *((f"{pattern_key}[{shown(name)}]", value) for name, value in pattern.items())]
    problems += [f"{where} is {shown(value)}; it must be {wanted}" for where, value in numbers if not is_number(value)]
    problems += [
        f"{pattern_key}[{shown(module)}] is no name of modules: letters, digits, _, - and dots, with ^, $, [0-9], \\d, "
        f"| and at most {MAX_REPEATS} of * and +; write the names out"
        for module in pattern
        if not _is_name_pattern(module)
    ]
    return problems


def _is_name_pattern(pattern: str) -> bool:
    """Whether matching takes no longer than a search through the name, whatever the pattern is."""
    if not PATTERN.fullmatch(pattern) or len(re.findall(r"[*+]", pattern)) > MAX_REPEATS:
        return False
    try:
        re.compile(pattern)
    except re.error:  # [z-a]
        return False
    return True


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_alpha(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= torch.finfo().max
