"""Keys of config.json that vLLM's layers of DeepSeek and GLM read otherwise than Hugging Face's. Pure Python.

Rows of `pruned_vllm/formats/agreement.py` are about keys by themselves; here is what several of them mean together.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from pruned_vllm.formats.config_values import is_positive, shown
from pruned_vllm.formats.family import Family

FIRST_DENSE = "first_k_dense_replace"


def for_vllm(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """Keys that vLLM needs and Hugging Face's model does not, with what they mean for that model."""
    keys: dict[str, Any] = {}
    if family.model_type == "deepseek_v3":  # else vLLM's router has no correction bias, and takes a softmax
        keys |= {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    if family.model_type == "deepseek_v2" and family.with_defaults(config)["topk_method"] == "greedy":
        keys |= {"n_group": 1, "topk_group": 1}  # vLLM knows no other router, and fails where they are null
    if (first := _first_dense_layers(family, config)) is not None:
        keys[FIRST_DENSE] = first
    return keys


def problems(family: Family, config: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each thing that the two sides would read otherwise."""
    if not family.latent_attention:
        return
    rope = config.get("rope_scaling") or config.get("rope_parameters")
    scales = [rope.get(key) for key in ("mscale", "mscale_all_dim")] if isinstance(rope, Mapping) else []
    if any(scale is not None for scale in scales) and not all(map(is_positive, scales)):
        yield (
            f"rope_parameters have mscale {shown(scales[0])} and mscale_all_dim {shown(scales[1])}: vLLM and Hugging "
            "Face's model agree where both are there and above 0, or neither is"
        )
    wanted, given = _first_dense_layers(family, config), config.get(FIRST_DENSE)
    if wanted is not None and given is not None and given != wanted:
        yield (
            f"{FIRST_DENSE} is {shown(given)}, but {wanted} by mlp_layer_types, or by its default where it is absent: "
            "Hugging Face's model ignores the one, vLLM the other"
        )


def _first_dense_layers(family: Family, config: Mapping[str, Any]) -> int | None:
    """How many layers have a dense MLP before the first one with experts, where `mlp_layer_types` says which have."""
    if family.experts is None or family.experts.layers != "mlp_types":
        return None
    types = config.get("mlp_layer_types")
    if not isinstance(types, list | tuple):
        return 1
    return next((index for index, kind in enumerate(types) if kind != "dense"), len(types))
