"""Files of a model directory: JSON, read with clear errors, and paths that files name. Pure Python."""

import json
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from types import UnionType
from typing import Any

from pruned_vllm.common.errors import InputError

FINETUNING_FILE = "finetuning.json"  # in a converted model that finetune-pruned has trained since


def cache_directory() -> Path:
    """Where what can be made again is kept between runs; it need not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pruned-vllm"


def read_json(path: Path, kind: type | UnionType = dict) -> Any:
    """The object in a JSON file, or what `kind` is. Raises InputError when that is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, kind):
        wanted = "object" if kind is dict else "object or list"
        raise InputError(f"{path} must hold a JSON {wanted}, not a {type(content).__name__}")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file; what it held before stays until the new content is complete."""
    temporary = path.with_name(f"{path.name}.partial")
    temporary.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    temporary.replace(path)


def is_inside(file: Any) -> bool:
    """Whether a path that a checkpoint names is plain and below its directory."""
    return (
        isinstance(file, str)
        and file.isprintable()
        and "\\" not in file
        and not PurePosixPath(file).is_absolute()
        and ".." not in PurePosixPath(file).parts
    )
