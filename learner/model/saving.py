"""Saves a model whose weights have changed; the rest of its directory is copied from the dense one.

Transformers refuses to write some models that it reads, such as those with a generation_config.json that sets a
temperature but no do_sample (early Llama-2, Vicuna). It says so when it saves, at the end of a run that may have taken
days. So `check_can_be_saved` tries before.
"""

import shutil
import tempfile
from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel

from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import read_json, write_json
from pruned_vllm.formats.companions import copy_companions
from pruned_vllm.formats.config import is_packed
from pruned_vllm.formats.wrappers import text_config


def check_can_be_saved(model: PreTrainedModel, name: str) -> None:
    """Tries to save all but the weights of `model`, and drops its generation settings, which are copied instead.

    Raises:
        InputError: Transformers refuses to save the model.
    """
    model.generation_config = GenerationConfig()
    with tempfile.TemporaryDirectory() as directory:
        try:
            model.save_pretrained(directory, state_dict={})
        except Exception as error:  # it raises many kinds
            raise InputError(
                f"Transformers could not save {name} when it is done: {type(error).__name__}: {error}"
            ) from error


def save_model(model: PreTrainedModel, source: Path, directory: Path) -> None:
    """Writes the weights of `model`, with the config, tokenizer and companions of the model directory `source`.

    config.json stays in the same words, of a multimodal model those about its text; only its dtype follows the weights.
    """
    model.save_pretrained(directory)
    dtype = str(model.dtype).removeprefix("torch.")
    config = read_json(source / "config.json")
    is_text, config = text_config(config) is config and not is_packed(config), dict(text_config(config))
    if is_packed(config):  # and was widened
        del config["quantization_config"]
    stored = {key: config[key] for key in ("dtype", "torch_dtype") if config.get(key) is not None}
    if is_text and set(stored.values()) <= {dtype}:
        shutil.copyfile(source / "config.json", directory / "config.json")
    else:
        write_json(directory / "config.json", config | dict.fromkeys(stored, dtype))
    (directory / "generation_config.json").unlink(missing_ok=True)
    copy_companions(source, directory)
