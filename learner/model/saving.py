"""Writes a model whose weights were trained, with all else as it was."""

from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel

from pruned_vllm.formats.companions import copy_companions

GENERATION_FILE = "generation_config.json"


def without_generation_config(model: PreTrainedModel) -> PreTrainedModel:
    """The model with plain defaults of sampling.

    Many published generation_config.json are invalid (a temperature without do_sample). Transformers reads them, but
    refuses to save a model with them, checkpoints of the Trainer included.
    """
    model.generation_config = GenerationConfig()
    return model


def save_model(model: PreTrainedModel, source: Path, directory: Path) -> None:
    """Saves weights and config.json into `directory`; tokenizer, chat template and so on are copied from `source`.

    Raises InputError, see `find_companions`.
    """
    without_generation_config(model).save_pretrained(directory)
    (directory / GENERATION_FILE).unlink()  # where the source has none, vLLM takes the token ids in config.json
    copy_companions(source, directory)
