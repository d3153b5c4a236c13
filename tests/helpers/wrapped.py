"""Tiny multimodal models of the real Hugging Face classes, around a language model that tests have already."""

from pathlib import Path

import torch
from helpers.tiny import VOCAB_SIZE
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
    return directory
