"""Biases that some projections of a sublayer have and others have not. Pure Python.

FLAP and its kind make up for what they remove with a bias of `o_proj` and `down_proj`, and leave config.json as it was.
There, Llama's `attention_bias` and `mlp_bias` speak of all projections of the sublayer together. So the keys are set
and the biases that are missing are zeros: x + 0 is x, and every reader of config.json understands it.
"""

from collections.abc import Collection, Mapping
from typing import Any

from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.tensors import Shapes

ATTENTION_BIASES = {f"self_attn.{projection}_proj.bias" for projection in "qkvo"}
MLP_BIASES = {f"mlp.{projection}_proj.bias" for projection in ("gate", "up", "down")}


def complete_biases(
    config: Mapping[str, Any], dense: ModelGeometry, names: Collection[str]
) -> tuple[dict[str, Any], Shapes]:
    """What makes a model complete whose files hold biases that its config.json does not mention.

    Args:
        config, dense: config.json, and the geometry in it.
        names: of the tensors in the files.

    Returns:
        `config` with the keys of these biases set, and the shapes of those that have to be added as zeros. Nothing
        changes where all is as config.json says, or where the family has no key for it.
    """
    found = {name.removeprefix("model.layers.").partition(".")[2] for name in names}
    sublayers = ((dense.family.o_bias, ATTENTION_BIASES), (dense.family.mlp_bias, MLP_BIASES))
    keys = [
        key
        for key, biases in sublayers
        if isinstance(key, str) and not config.get(key) and not biases.isdisjoint(found)
    ]
    if not keys:
        return dict(config), {}
    completed = {**config, **dict.fromkeys(keys, True)}
    shapes = ModelGeometry.from_config(completed).tensor_shapes()
    weights = {name: f"{name.removesuffix('.bias')}.weight" for name in shapes if name.endswith("_proj.bias")}
    # Where the weight is missing too, it is not for the bias alone that the model is incomplete.
    return completed, {name: shapes[name] for name, weight in weights.items() if name not in names and weight in names}
