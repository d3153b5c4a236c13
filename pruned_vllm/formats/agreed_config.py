"""config.json as vLLM has to have it: the rows of agreement.py, applied. Pure Python.

Beside keys that one side alone reads there are numbers that vLLM looks for in another place, and values that mean
something together.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from pruned_vllm.common.errors import InputError
from pruned_vllm.formats import deepseek_keys
from pruned_vllm.formats.agreement import ROPE, Row, rows_of
from pruned_vllm.formats.config_values import is_positive, shown
from pruned_vllm.formats.families import ACTIVATIONS
from pruned_vllm.formats.family import Family

QUERY_SCALING = "llama_4_scaling"


def check_agreement(what: str, family: Family, config: Mapping[str, Any]) -> None:
    """Raises InputError, which begins with `what`, where `refusals` has anything to say of a config.json."""
    if problems := refusals(family, config):
        raise InputError(f"{what}: vLLM would not compute what Hugging Face's model computes:", problems)


def refusals(family: Family, config: Mapping[str, Any]) -> list[str]:
    """A sentence for each value that is refused."""
    found = [f"{key} is {value!r}: {row.why}" for key, value, row in _disagreeing(family, config, "refused")]
    return [*found, *_factor_problems(family, config), *deepseek_keys.problems(family, config)]


def _factor_problems(family: Family, config: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the numbers that a family multiplies or divides by."""
    values = {key: config.get(key, 1) for key in family.multipliers}
    if family.query_scale_key is not None:
        values[family.query_scale_key] = family.with_defaults(config)[family.query_scale_key]
    for key, value in values.items():
        if not is_positive(value):
            yield f"{key} is {shown(value)}; it must be a number above 0"
    if (wanted := query_scaling(family, config)) is None:
        return
    given = config.get(QUERY_SCALING)
    if not all(map(is_positive, wanted.values())):
        yield (
            "rope_parameters lack llama_4_scaling_beta or original_max_position_embeddings, or they are no numbers "
            "above 0; Hugging Face's model needs both"
        )
    elif given is not None and given != wanted:
        yield f"{QUERY_SCALING} is {shown(given)}, but rope_parameters say {wanted!r}"


def told(family: Family, config: Mapping[str, Any]) -> list[str]:
    """Sentences about keys that the two sides read alike in some uses only."""
    return [f"{key}: {row.why}." for key, _, row in _disagreeing(family, config, "told")]


def query_scaling(family: Family, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What vLLM wants under `llama_4_scaling`: how Ministral 3 scales queries at positions beyond the first thousands.

    Hugging Face's model has it inside of rope_parameters, where vLLM does not look. None in other families.
    """
    if family.model_type != "ministral3":
        return None
    rope = config.get("rope_scaling") or config.get("rope_parameters")
    if not isinstance(rope, Mapping):  # what the config class fills in
        rope = {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 16384}
    original = "original_max_position_embeddings"
    return {original: rope.get(original), "beta": rope.get("llama_4_scaling_beta")}


def lacking(family: Family, config: Mapping[str, Any]) -> list[str]:
    """The keys that vLLM needs in a config.json beside those of Hugging Face's model, and that are not there."""
    return [QUERY_SCALING] * (query_scaling(family, config) is not None and config.get(QUERY_SCALING) is None)


def left_out(family: Family, config: Mapping[str, Any]) -> list[str]:
    """The keys that `agreed_config` leaves out although they say something."""
    return [key for key, _, _ in _disagreeing(family, config, "dropped")]


def agreed_config(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` so that vLLM reads it as Hugging Face's model does.

    That is without what only vLLM acts on, and with what only vLLM has to be told.
    """
    dropped = {key for key, row in rows_of(family).items() if row.action == "dropped"}
    agreed = {key: value for key, value in config.items() if key not in dropped}
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(rope := agreed.get(name), Mapping):  # vLLM fails for a null that Hugging Face takes for absent
            agreed[name] = _agreed_rope(rope, dropped)
    names = ACTIVATIONS[family.activation]
    if agreed.get(family.activation_key) in names[1:]:  # the same function, but vLLM does not know the name
        agreed[family.activation_key] = names[0]
    agreed |= deepseek_keys.for_vllm(family, config)
    scaling = query_scaling(family, config)
    return agreed if scaling is None else agreed | {QUERY_SCALING: scaling}


def _agreed_rope(rope: Mapping[str, Any], dropped: set[str]) -> dict[str, Any]:
    """The rotary keys, by type of layer in some families, without those that are null or dropped."""
    return {
        key: _agreed_rope(value, dropped) if isinstance(value, Mapping) else value
        for key, value in rope.items()
        if value is not None and ROPE + key not in dropped
    }


def stock_agrees(family: Family, config: Mapping[str, Any]) -> bool:
    """Whether vLLM's own class computes what Hugging Face's does from a config that agrees."""
    return not list(_disagreeing(family, config, "not stock"))


def _disagreeing(family: Family, config: Mapping[str, Any], action: str) -> Iterator[tuple[str, Any, Row]]:
    """The keys that have rows with this action, and values that are not allowed."""
    rows = rows_of(family)
    for key, value in _flat(config):
        row = rows.get(key)
        says_nothing = value is None or (action == "dropped" and value is False)
        if row is not None and row.action == action and not says_nothing and value not in row.allowed:
            yield key, value, row


def _flat(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The keys and values, those of the rotary embedding with their prefix."""
    yield from config.items()
    rope = config.get("rope_scaling") or config.get("rope_parameters")
    if isinstance(rope, Mapping):
        by_layer_type = [part for part in rope.values() if isinstance(part, Mapping)]
        for part in (rope, *by_layer_type):
            rope_type = part.get("rope_type", part.get("type"))
            yield from ((ROPE + key, value) for key, value in {**part, "rope_type": rope_type}.items())
