"""Biases that some projections of a sublayer have and others have not.

FLAP and its kind make up for what they remove with a bias of `o_proj` and `down_proj`, and leave config.json as it was.
There, Llama's `attention_bias` and `mlp_bias` speak of all projections of the sublayer together. So the keys are set
and the biases that are missing are written as zeros: x + 0 is x, and every reader of config.json understands it.
"""

from converter.checkpoint import Checkpoint
from pruned_vllm.formats.geometry import ModelGeometry

ATTENTION_BIASES = {f"self_attn.{projection}_proj.bias" for projection in "qkvo"}
MLP_BIASES = {f"mlp.{projection}_proj.bias" for projection in ("gate", "up", "down")}


def with_all_biases(checkpoint: Checkpoint, dense: ModelGeometry) -> ModelGeometry:
    """Sets the keys in `checkpoint.config`, adds zeros to `checkpoint`, and returns the geometry that follows.

    Nothing changes where all biases are as config.json says, or where it has no key for them.
    """
    found = {name.removeprefix("model.layers.").partition(".")[2] for name in checkpoint.shapes}
    sublayers = ((dense.family.o_bias, ATTENTION_BIASES), (dense.family.mlp_bias, MLP_BIASES))
    keys = [
        key for key, biases in sublayers if isinstance(key, str) and not checkpoint.config.get(key) and biases & found
    ]
    if not keys:
        return dense
    checkpoint.config = {**checkpoint.config, **dict.fromkeys(keys, True)}
    complete = ModelGeometry.from_config(checkpoint.config)
    shapes = complete.tensor_shapes()
    checkpoint.add_zeros({name: shapes[name] for name in shapes if name.endswith("_proj.bias")})
    return complete
