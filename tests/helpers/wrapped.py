"""Tiny multimodal models of the real Hugging Face classes, around a language model that tests have already."""

import re
from pathlib import Path

import torch
from helpers.tiny import VOCAB_SIZE
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
WRAPPERS = {  # model type of the language model -> that of the multimodal one, and what it wants beside
    "gemma3_text": (
        "gemma3",
        {"mm_tokens_per_image": 4, "vision_config": {"model_type": "siglip_vision_model", **VISION}},
    ),
    **{
        f"{name}_text": (name, {"vision_config": {"depth": 1, "num_heads": 2, **VISION, "out_hidden_size": 96}})
        for name in ("qwen3_5", "qwen3_5_moe")
    },
    "ministral3": ("mistral3", {"vision_config": {"model_type": "pixtral", "head_dim": 8, **VISION}}),
    "mistral": ("mistral3", {"vision_config": {"model_type": "pixtral", "head_dim": 8, **VISION}}),
}


def save_wrapped(directory: Path, text: PreTrainedModel, **save_options) -> Path:
    """Saves a multimodal model whose language model has the weights of `text`, as save_pretrained writes it."""
    model_type, options = WRAPPERS[text.config.model_type]
    tied = text.config.tie_word_embeddings
    config = AutoConfig.for_model(
        model_type,
        text_config=text.config.to_dict(),
        image_token_index=VOCAB_SIZE - 1,
        tie_word_embeddings=tied,
        **options,
    )
    torch.manual_seed(1)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    model.save_pretrained(directory, **save_options)
    if hasattr(text.config, "num_experts"):
        fuse_experts(directory)
    return directory


def fuse_experts(directory: Path) -> None:
    """Stores all experts of a layer in two tensors, as published Qwen3.5 does, of a model that is one file."""
    tensors, prefixes = load_file(directory / "model.safetensors"), set()
    for name in list(tensors):
        if match := re.fullmatch(r"(.+\.mlp\.experts)\.0\.up_proj\.weight", name):
            prefixes.add(match[1])
    for prefix in prefixes:
        count = len([name for name in tensors if re.fullmatch(rf"{re.escape(prefix)}\.\d+\.up_proj\.weight", name)])
        gate, up, down = (
            torch.stack([tensors.pop(f"{prefix}.{expert}.{name}_proj.weight") for expert in range(count)])
            for name in ("gate", "up", "down")
        )
        tensors |= {f"{prefix}.gate_up_proj": torch.cat((gate, up), dim=1), f"{prefix}.down_proj": down}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
