"""Multimodal models: where the language model is in their config.json and in their files. Pure Python.

What is pruned and served of them is the language model alone. Its config.json is what they hold under `text_config`,
its tensors have a prefix more, and those of the other towers are left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import read_json
from pruned_vllm.formats.config_values import shown
from pruned_vllm.formats.families import FAMILIES

# Prefixes of the language model's tensors, with what they are in a model of text alone.
TEXT_PREFIXES = {
    "language_model.model.": "model.",
    "model.language_model.": "model.",
    "language_model.lm_head.": "lm_head.",
}
OTHER_TOWERS = tuple(
    f"{model}{part}" for model in ("", "model.") for part in ("vision_tower.", "multi_modal_projector.", "visual.")
)
DRAFT = "mtp."  # prefix of layers that draft tokens ahead (multi-token prediction), beside those of the model
# Keys that may be at the top level, for both parts of the model.
_SHARED_KEYS = (
    *("dtype", "torch_dtype", "quantization_config", "tie_word_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)


@dataclass(frozen=True)
class Wrapper:
    """A multimodal architecture.

    Attributes:
        architecture: in `architectures` of its config.json.
        text_model_type: of `text_config` where that names none.
    """

    architecture: str
    text_model_type: str


WRAPPERS = {
    "gemma3": Wrapper("Gemma3ForConditionalGeneration", "gemma3_text"),
    "qwen3_5": Wrapper("Qwen3_5ForConditionalGeneration", "qwen3_5_text"),
    "qwen3_5_moe": Wrapper("Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe_text"),
    "mistral3": Wrapper("Mistral3ForConditionalGeneration", "mistral"),
}


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config.json of a multimodal model's language model; any other `config` as it is.

    Raises:
        InputError: there is no `text_config`, or the model is no generative one.
    """
    wrapper = WRAPPERS.get(str(config.get("model_type")))
    if wrapper is None:
        return config
    text, architectures = config.get("text_config"), config.get("architectures") or []
    if not isinstance(text, Mapping):
        raise InputError(
            f"config.json: model_type {config['model_type']!r} is a multimodal model, but text_config, which describes "
            f"its language model, is {'missing' if text is None else shown(text)}; download config.json again"
        )
    if not isinstance(architectures, list) or any(name != wrapper.architecture for name in architectures):
        raise InputError(
            f"config.json: architectures {shown(architectures)} with model_type {config['model_type']!r} is not "
            f"supported: it is not {wrapper.architecture}"
        )
    model_type = text.get("model_type") or wrapper.text_model_type
    shared = {key: config[key] for key in _SHARED_KEYS if config.get(key) is not None}
    text = {**shared, **{key: value for key, value in text.items() if key not in ("architectures", "model_type")}}
    family = FAMILIES.get(str(model_type))
    architecture = [] if family is None else [family.architecture]  # others are refused by whoever reads the sizes
    known = text if family is None else family.with_defaults(text)
    return {"architectures": architecture, "model_type": model_type, **known}


def wrapped_architecture(directory: Path) -> str | None:
    """The multimodal architecture whose language model is read from `directory`; None where it is no such model."""
    path = directory / "config.json"
    wrapper = WRAPPERS.get(str(read_json(path).get("model_type"))) if path.is_file() else None
    return wrapper.architecture if wrapper else None
