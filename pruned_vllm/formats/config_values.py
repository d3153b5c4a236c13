"""Values of config.json, checked. Pure Python. All functions raise ValueError with the key and the value."""

from collections.abc import Mapping
from typing import Any


def positive(config: Mapping[str, Any], key: str) -> int:
    """A whole number of at least 1."""
    value = config.get(key)
    if not _is_whole(value) or value < 1:
        raise ValueError(f"{key} is {value!r}; it must be a whole number of at least 1")
    return value


def natural(config: Mapping[str, Any], key: str, default: int) -> int:
    """A whole number of at least 0."""
    value = config.get(key, default)
    if not _is_whole(value) or value < 0:
        raise ValueError(f"{key} is {value!r}; it must be a whole number of at least 0")
    return value


def flag(known: bool | str, config: Mapping[str, Any]) -> bool:
    """`known` if that is a bool, else the value of the key `known`; absent is False."""
    value = known if isinstance(known, bool) else config.get(known)
    if not isinstance(value, bool | None):
        raise ValueError(f"{known} is {value!r}; it must be true or false")
    return bool(value)


def naturals(config: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """A list of whole numbers of at least 0; absent and null are empty."""
    value = config.get(key) or []
    if not isinstance(value, list | tuple) or not all(_is_whole(number) and number >= 0 for number in value):
        raise ValueError(f"{key} is {value!r}; it must be a list of whole numbers of at least 0")
    return tuple(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
