"""config.json of a model whose tensors were cut already, made right: what all layers share, as the tensors have it.

Projects that cut tensors leave config.json as it was, or write the sizes of one of the layers into it.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from converter.checkpoint import Checkpoint
from converter.hidden import EMBEDDING
from pruned_vllm.formats.config import dense_geometry
from pruned_vllm.formats.config_values import shown
from pruned_vllm.formats.geometry import PER_LAYER_LISTS, ModelGeometry
from pruned_vllm.formats.headers import StoredTensor
from pruned_vllm.formats.layer import LayerGeometry

# Sizes by layer that RTP-LLM and its kind write beside the tensors. The tensors say the same, and config.json must not
# say it twice.
SIZE_LISTS = ("layer_head_num", "layer_inter_size", "layer_num")
# CarveLM writes these, empty where no sublayer was removed; see converter/inexpressible.py.
EMPTY_LISTS = ("attention_layer_to_prune", "mlp_layer_to_prune")
_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.")


def shared_config(weights: Checkpoint, base: Mapping[str, Any] | None) -> tuple[dict[str, Any], list[str]]:
    """config.json with the sizes that all layers share as the tensors have them, and sentences about what changed.

    Args:
        base: config.json of the model before pruning. Without it, head_dim is what config.json says of it; where that
            says nothing, what the frequencies of RoPE tell that old checkpoints have; else hidden_size by heads.

    Raises:
        InputError: the model is not supported.
    """
    config = {key: value for key, value in weights.config.items() if key not in (*SIZE_LISTS, *EMPTY_LISTS)}
    stated, notes = dense_geometry(weights.directory, config), list[str]()
    if base is not None:
        config["head_dim"] = ModelGeometry.from_config(base).head_dim
    elif config.get("head_dim") is None:
        config["head_dim"] = _rotated_dimensions(weights) or stated.head_dim
    embedding = weights.tensors.get(EMBEDDING)
    if embedding is not None and len(embedding.shape) == 2 and embedding.shape[1] != stated.hidden_size:
        config["hidden_size"] = embedding.shape[1]
        notes.append(f"The hidden size is {embedding.shape[1]:,}, where config.json says {stated.hidden_size:,}.")
    numbers = [int(match[1]) for match in map(_LAYER.match, weights.tensors) if match]
    num_layers = max(numbers, default=-1) + 1
    if 0 < num_layers < len(stated.layers):
        config["num_hidden_layers"] = num_layers
        config |= {key: config[key][:num_layers] for key in PER_LAYER_LISTS if isinstance(config.get(key), list)}
        said = len(stated.layers)
        notes.append(f"The files have {num_layers} layers, where config.json says {said}: the last are gone.")
    notes += _correct_num_experts(config, weights, stated)
    return config, notes


def with_largest_layer(
    config: Mapping[str, Any], stated: ModelGeometry, layers: Sequence[LayerGeometry]
) -> dict[str, Any]:
    """`config` whose top level, which `stated` is the geometry of, says no less heads, channels and experts than any
    layer has.

    Some projects write the sizes of the last layer there.
    """
    changed = dict(config)
    top = stated.dense_layers[0]
    heads = max(layer.num_attention_heads for layer in layers)
    kv_heads = max(layer.num_key_value_heads for layer in layers)
    if heads > top.num_attention_heads or kv_heads > top.num_key_value_heads:
        kv_heads = max(kv_heads, top.num_key_value_heads)
        heads = max(heads, top.num_attention_heads)
        changed |= {"num_key_value_heads": kv_heads, "num_attention_heads": -(-heads // kv_heads) * kv_heads}
    width, stated_width = (
        max((layer.intermediate_size for layer in some if not layer.expert_intermediate_sizes), default=0)
        for some in (layers, stated.dense_layers)
    )
    if width > stated_width:
        changed["intermediate_size"] = width
    count = max(len(layer.expert_intermediate_sizes) for layer in layers)
    if stated.experts is not None and count > stated.experts.num_experts:
        changed |= stated.family.experts_format.with_count(config, count)
    return changed


def size_list_problems(config: Mapping[str, Any], layers: Sequence[LayerGeometry]) -> list[str]:
    """Where the lists of SIZE_LISTS say something else than the layers; those that are gone at the end count as 0."""
    sizes = {
        "layer_head_num": [layer.num_attention_heads for layer in layers],
        "layer_inter_size": [layer.intermediate_size for layer in layers],
    }
    problems = []
    for key, found in sizes.items():
        stated = config.get(key)
        if isinstance(stated, list) and stated != found + [0] * (len(stated) - len(found)):
            problems.append(f"config.json: {key} is {shown(stated)}, the tensors have {found}")
    return problems


def num_experts(tensors: Mapping[str, StoredTensor], stated: ModelGeometry, index: int) -> int | None:
    """The experts of a layer, which its router has rows for; None where there is no router."""
    router = tensors.get(f"model.layers.{index}.{stated.family.experts_format.router}.weight")
    return router.shape[0] if router is not None and len(router.shape) == 2 else None


def _rotated_dimensions(weights: Checkpoint) -> int | None:
    """head_dim by the frequencies of RoPE [head_dim / 2], if all that there are agree."""
    shapes = {tensor.shape for name, tensor in weights.tensors.items() if name.endswith(".rotary_emb.inv_freq")}
    (shape,) = shapes if len(shapes) == 1 else [()]
    return 2 * shape[0] or None if len(shape) == 1 else None


def _correct_num_experts(config: dict[str, Any], weights: Checkpoint, stated: ModelGeometry) -> list[str]:
    """Lets `config` say as many experts as the layers have, where that is one number. Returns a sentence where layers
    have another than config.json says."""
    with_experts = [index for index, layer in enumerate(stated.layers) if layer.expert_intermediate_sizes]
    found = [num_experts(weights.tensors, stated, index) for index in with_experts]
    counts = {count for count in found if count is not None}
    if not counts or counts == {stated.dense_experts.num_experts}:
        return []
    said, least, most = stated.dense_experts.num_experts, min(counts), max(counts)
    if least == most:
        config |= stated.family.experts_format.with_count(config, most)
    left = f"{most}" if least == most else f"{least} to {most}"
    return [f"A layer has {left} experts, where config.json says {said}."]
