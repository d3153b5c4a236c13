"""Files of a model directory: JSON, read with clear errors, and what goes along with the weights. Pure Python."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pruned_vllm.common.errors import InputError

FINETUNING_FILE = "finetuning.json"  # in a converted model that finetune-pruned has trained since

# Everything a tokenizer, a chat template or a licence may consist of. Not *.py: no code is carried along.
COMPANIONS = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


def cache_directory() -> Path:
    """Where what can be made again is kept between runs; it need not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pruned-vllm"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises InputError when it is missing, damaged or no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file; what it held before stays until the new content is complete."""
    temporary = path.with_name(f"{path.name}.partial")
    temporary.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    temporary.replace(path)


def copy_companions(source: Path, target: Path) -> None:
    """Copies the COMPANIONS of a model from directory to directory."""
    for file in {file for pattern in COMPANIONS for file in source.glob(pattern) if file.is_file()}:
        copy = target / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)
