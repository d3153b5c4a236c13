"""Masks on a running Hugging Face model: what the learned numbers multiply.

This is the definition that a converted model is held to: `with apply_masks(model, masks, site): model(...)` computes
what the converted model must compute.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from pruned_vllm.masked_checkpoint import CHANNEL_MASK, CHANNEL_MASK_SITES, HEAD_MASK


@contextmanager
def apply_masks(
    model: nn.Module, masks: Mapping[str, torch.Tensor], channel_mask_site: str = "product"
) -> Iterator[None]:
    """Multiplies heads and FFN channels of `model` by `masks` while the block runs.

    Backward passes that recompute activations must run inside of the block too.

    Args:
        model: a Llama-like ...ForCausalLM.
        masks: tensors under the keys of pruning_masks.safetensors; a missing key multiplies nothing. Gradients flow
            into them.
        channel_mask_site: "product" multiplies act(gate) * up, "gate_and_up" both projections before the activation.
    """
    if channel_mask_site not in CHANNEL_MASK_SITES:
        raise ValueError(f"channel_mask_site is {channel_mask_site!r}; it must be one of {CHANNEL_MASK_SITES}")
    handles = []
    for index, layer in enumerate(model.model.layers):
        head_mask = masks.get(HEAD_MASK.format(index))
        channel_mask = masks.get(CHANNEL_MASK.format(index))
        if head_mask is not None:
            handles.append(layer.self_attn.o_proj.register_forward_pre_hook(_multiply_input(head_mask)))
        if channel_mask is not None and channel_mask_site == "product":
            handles.append(layer.mlp.down_proj.register_forward_pre_hook(_multiply_input(channel_mask)))
        elif channel_mask is not None:
            for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
                handles.append(projection.register_forward_hook(_multiply_output(channel_mask)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _multiply_input(mask: torch.Tensor):
    """Multiplies an input [..., units * size] by one factor a unit; size is head_dim for heads and 1 for channels."""

    def hook(module: nn.Module, args: tuple[torch.Tensor]):
        x = args[0]
        return ((x.unflatten(-1, (len(mask), -1)) * mask.to(x.dtype)[:, None]).flatten(-2),)

    return hook


def _multiply_output(mask: torch.Tensor):
    return lambda module, args, output: output * mask.to(output.dtype)
