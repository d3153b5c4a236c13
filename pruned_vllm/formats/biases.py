"""Biases that some projections of a sublayer have and others have not. Pure Python.

FLAP and its kind make up for what they remove with a bias of `o_proj` and `down_proj`, and leave config.json as it was.
There, Llama's `attention_bias` and `mlp_bias` speak of all projections of the sublayer together. So the keys are set
and the biases that are missing are zeros: x + 0 is x, and every reader of config.json understands it.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pruned_vllm.formats.families import find_family
from pruned_vllm.formats.headers import StoredTensor

_ATTENTION = re.compile(r"(model\.layers\.\d+\.self_attn\.[qkvo]_proj)\.(weight|bias)")
_MLP = re.compile(r"(model\.layers\.\d+\.mlp\.(?:gate|up|down)_proj)\.(weight|bias)")


def complete_biases(
    config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """`config` with the keys of biases that it does not mention, and `tensors` with zeros for those that are missing.

    Nothing changes where all is as config.json says, or where the family has no key for these biases.
    """
    config, tensors = dict(config), dict(tensors)
    family = find_family(config)
    for key, pattern in ((family.o_bias, _ATTENTION), (family.mlp_bias, _MLP)):
        found = [match for match in map(pattern.fullmatch, tensors) if match]
        if not isinstance(key, str) or config.get(key) or all(match[2] == "weight" for match in found):
            continue
        config[key] = True
        for bias, weight in ((f"{match[1]}.bias", match[0]) for match in found if match[2] == "weight"):
            if bias not in tensors:
                tensors[bias] = replace(tensors[weight], shape=tensors[weight].shape[:1], is_zeros=True)
    return config, tensors
