"""JSON files, read with clear errors. Pure Python."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pruned_vllm.errors import InputError


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
    path.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
