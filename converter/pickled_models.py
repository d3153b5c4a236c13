"""A whole model that was pickled: its config.json, its tensors, and what its weights alone do not tell.

A pickle of a module names the classes whose code computes with the weights. That code is not here and is not run, so
the class must be one whose computation is known by its name, and nothing may have been replaced or added in the object.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

from converter.hidden import EMBEDDING
from converter.pickles import Stub, attributes
from converter.torch_files import walk_modules
from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.agreement import ROPE, rows_of
from pruned_vllm.formats.config import NULL_IS_ABSENT
from pruned_vllm.formats.families import FAMILIES
from pruned_vllm.formats.family import Family
from pruned_vllm.formats.geometry import ModelGeometry

# Keys of the table of agreement that do not describe what the model computes, or that are said anew.
_NOT_TAKEN = {
    *("architectures", "model_type", "dtype", "name_or_path", "sub_configs", "is_heterogeneous"),
    *("per_layer_config", "quantization_config"),
}
_LONGEST_LIST, _MOST_KEYS = 2000, 100  # of what is inside of a configuration
_LONGEST_TEXT = 1000
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def model_class(texts: list[str]) -> str | None:
    """The class of a causal language model among the names that a pickle begins with."""
    return next((text for text in texts if "." in text and text.endswith("ForCausalLM")), None)


def family_of(model: Stub) -> Family:
    """The row of a pickled model, by the name of its class. Raises InputError."""
    family = next((family for family in FAMILIES.values() if family.architecture == model.name), None)
    if family is None:
        supported = ", ".join(family.architecture for family in FAMILIES.values())
        raise InputError(f"a pickled {model.name[:80]!r} is not supported; supported: {supported}")
    return family


def replaced_parts(model: Stub) -> list[str]:
    """Names of the modules whose computation was replaced or added to in the object itself."""
    changed = []
    for name, part in walk_modules(model):
        held = attributes(part)
        if "forward" in held or any(held.get(hooks) for hooks in _HOOKS):
            changed.append(name or "the model")
    return changed


def config_of(model: Stub, family: Family) -> dict[str, Any]:
    """config.json from the configuration in a pickled model, of keys that are known.

    The sizes are those before pruning, but for hidden_size where a project has corrected it.

    Raises:
        InputError: there is none, or something that changes what is computed is no value that JSON can say.
    """
    rows, found = rows_of(family), attributes(model.get("config"))
    known = {key for key, row in rows.items() if row.action != "dropped" and not key.startswith(ROPE)}
    known = (known | {"rms_norm_eps", "rope_scaling"}) - _NOT_TAKEN
    idle = {key for key, row in rows.items() if row.action == "idle"}  # changes nothing that is computed
    if odd := sorted(key for key in known - idle if not _is_json(found.get(key))):
        raise InputError(
            f"the configuration of the pickled {family.architecture} has values that config.json cannot have, as "
            f"{odd[0]}; give the dense model's with --base-model"
        )
    config = {
        key: _as_json(found[key])
        for key in sorted(known)
        if key in found and _is_json(found[key]) and not (found[key] is None and key in NULL_IS_ABSENT)
    }
    if not config:
        raise InputError(f"the pickled {family.architecture} has no configuration; give it with --base-model")
    return {"architectures": [family.architecture], "model_type": family.model_type, **config}


def fitted_config(config: Mapping[str, Any], model: Stub, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """`config` with the head_dim of the attention modules, and the hidden size and dtype of the embedding.

    Raises:
        InputError: the modules contradict each other.
    """
    head_dims = _head_dims(model, tensors)
    if len(set(head_dims.values())) > 1:
        found = [f"{name}: {head_dim}" for name, head_dim in head_dims.items()]
        raise InputError("The attention modules have different head_dim, which no configuration can say:", found)
    head_dim = next(iter(head_dims.values()), None) or ModelGeometry.from_config(config).head_dim
    fitted = {**{key: value for key, value in config.items() if key != "torch_dtype"}, "head_dim": head_dim}
    embedding = tensors.get(EMBEDDING)
    if embedding is not None and embedding.dim() == 2:
        fitted |= {"hidden_size": embedding.shape[1], "dtype": str(embedding.dtype).removeprefix("torch.")}
    return fitted


def hidden_size_before(model: Stub) -> int | None:
    """The hidden size that an attention module remembers of the model before pruning; newer classes do not."""
    sizes = (_whole(part.get("hidden_size")) for name, part in walk_modules(model) if name.endswith(".self_attn"))
    return next(sizes, None)


def _head_dims(model: Stub, tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """head_dim by attention module: its attribute, else the rows of q by its own number of heads."""
    found = {}
    for name, part in walk_modules(model):
        query = tensors.get(f"{name}.q_proj.weight")
        if query is None or query.dim() != 2 or not len(query):
            continue
        head_dim, heads = _whole(part.get("head_dim")), _whole(part.get("num_heads"))
        if head_dim is None and heads and not len(query) % heads:
            head_dim = len(query) // heads
        if head_dim:
            found[name] = head_dim
    return found


def _whole(value: Any) -> int | None:
    """A positive number; FLAP leaves tensors without dimensions where there were numbers."""
    if isinstance(value, torch.Tensor) and value.dim() == 0 and not value.is_floating_point():
        value = int(value)
    return value if type(value) is int and 0 < value < 1 << 31 else None


def _is_json(value: Any) -> bool:
    """Whether this is a number, a text, a list of such, or a mapping with such under its names."""
    if isinstance(value, dict):
        return len(value) <= _MOST_KEYS and all(
            isinstance(key, str) and _is_scalar(key) and (_is_scalar(entry) or _is_list(entry))
            for key, entry in value.items()
        )
    return _is_scalar(value) or _is_list(value)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) <= _LONGEST_LIST and all(map(_is_scalar, value))


def _is_scalar(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= _LONGEST_TEXT and value.isprintable()
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, bool) or (isinstance(value, int) and abs(value) < 1 << 63)


def _as_json(value: Any) -> Any:
    """The same with lists for tuples."""
    if isinstance(value, dict):
        return {key: _as_json(entry) for key, entry in value.items()}
    return list(value) if isinstance(value, tuple) else value
