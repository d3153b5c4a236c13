"""Values of config.json, checked. Pure Python. All functions raise ValueError with the key and the value.

Null is the same as absent. Numbers have a bound, so that a damaged config.json costs a message and not the memory.
"""

from collections.abc import Mapping
from typing import Any, TypeGuard

LARGEST_SIZE = 2**31 - 1
LARGEST_NUMBER = 1e30  # any dtype but float16 can say it
LARGEST_COUNT = 10_000  # of what is counted one by one: layers, heads of a layer, experts of a layer


def positive(config: Mapping[str, Any], key: str, default: int | None = None, most: int = LARGEST_SIZE) -> int:
    """A whole number from 1 to `most`."""
    return _whole(config, key, default, 1, most)


def natural(config: Mapping[str, Any], key: str, default: int) -> int:
    """A whole number from 0 on."""
    return _whole(config, key, default, 0, LARGEST_SIZE)


def number(config: Mapping[str, Any], key: str, default: float) -> float:
    """A number above 0."""
    value = config.get(key)
    if value is None:
        return default
    if not is_positive(value) or not value < LARGEST_NUMBER:
        raise ValueError(f"{key} is {shown(value)}; it must be a number above 0")
    return float(value)


def is_positive(value: Any) -> bool:
    """Whether it is a number above 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


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
        raise ValueError(f"{key} is {shown(value)}; it must be a list of whole numbers of at least 0")
    return tuple(value)


def without_nulls(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a mapping that have a value."""
    return {key: value for key, value in config.items() if value is not None}


def _whole(config: Mapping[str, Any], key: str, default: int | None, least: int, most: int) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if not _is_whole(value) or value < least:
        raise ValueError(f"{key} is {shown(value)}; it must be a whole number of at least {least}")
    if value > most:
        raise ValueError(f"{key} is {shown(value)}; it must be a whole number of at most {most:,}")
    return value


def shown(value: Any) -> str:
    """`repr`, shortened."""
    if _is_whole(value) and abs(value) > 10**30:  # Python refuses to print very long numbers
        return "a number of more than 30 digits"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
