"""Masks on a running Hugging Face model: what the learned numbers multiply.

Transformers holds all experts of a layer in two tensors, and computes with them in one of several ways. Where it groups
tokens by expert ("grouped_mm", its default), the mask multiplies the activations of each token, so that no weight is
copied and none needs a gradient. In the other ways no hook sees the products, and the mask multiplies the weights, in
the place where that is the same for every input: W_down's columns are what the product is multiplied by next, and the
rows of W_gate and W_up are the projections before the activation.

This is the definition that a converted model is held to: `with apply_masks(model, masks, site): model(...)` computes
what the converted model must compute.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from pruned_vllm.formats.masked import CHANNEL_MASK_SITES, layer_masks


@contextmanager
def apply_masks(
    model: PreTrainedModel, masks: Mapping[str, torch.Tensor], channel_mask_site: str = "product"
) -> Iterator[None]:
    """Multiplies heads, FFN channels and channels of experts of `model` by `masks` while the block runs.

    Backward passes that recompute activations must run inside of the block too.

    Args:
        model: a Llama-like ...ForCausalLM.
        masks: tensors under the keys of pruning_masks.safetensors; a missing key multiplies nothing. Gradients flow
            into them.
        channel_mask_site: "product" multiplies act(gate) * up, "gate_and_up" both projections before the activation.
    """
    if channel_mask_site not in CHANNEL_MASK_SITES:
        raise ValueError(f"channel_mask_site is {channel_mask_site!r}; it must be one of {CHANNEL_MASK_SITES}")
    with ExitStack() as stack:
        layers = model.model.layers
        for layer, of_layer in zip(layers, layer_masks(masks, len(layers)), strict=True):
            if of_layer.head is not None:
                handle = layer.self_attn.o_proj.register_forward_pre_hook(_multiply_input(of_layer.head))
                stack.callback(handle.remove)
            if of_layer.channel is not None:
                _mask_mlp(stack, mlp_of_all_tokens(layer), of_layer.channel, channel_mask_site)
            if of_layer.expert is not None:
                _mask_experts(stack, layer.mlp.experts, of_layer.expert, channel_mask_site)
        yield


@contextmanager
def restrict_routers(model: PreTrainedModel, masks: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Lets the routers of `model` choose, while the block runs, among the experts to which `masks` leave any channel.

    Their scores are those of these alone. That is what convert-pruned --drop-empty-experts makes of the masks. Only for
    models that Transformers has: its routers return (logits, weights of the chosen, their numbers).
    """
    with ExitStack() as stack:
        layers = model.model.layers
        for layer, of_layer in zip(layers, layer_masks(masks, len(layers)), strict=True):
            if of_layer.expert is None:
                continue
            gate = layer.mlp.gate if hasattr(layer.mlp, "gate") else layer.mlp.router
            kept = of_layer.expert.any(dim=1).nonzero().view(-1).to(next(gate.parameters()).device)
            changes: dict[str, Any] = {
                name: nn.Parameter(parameter[kept], requires_grad=False) for name, parameter in gate.named_parameters()
            }
            if hasattr(gate, "num_experts"):
                changes["num_experts"] = len(kept)
            if hasattr(gate, "e_score_correction_bias"):
                changes["e_score_correction_bias"] = gate.e_score_correction_bias[kept]
            for name, value in changes.items():
                stack.callback(setattr, gate, name, getattr(gate, name))
                setattr(gate, name, value)
            handle = gate.register_forward_hook(lambda _, args, output, kept=kept: (*output[:2], kept[output[2]]))
            stack.callback(handle.remove)
        yield


def mlp_of_all_tokens(layer: Any) -> Any:
    """The MLP of a decoder layer that every token passes: where it has experts, that of the shared ones."""
    names = ("shared_expert", "shared_experts") if hasattr(layer.mlp, "experts") else ()
    return next((getattr(layer.mlp, name) for name in names if hasattr(layer.mlp, name)), layer.mlp)


def _mask_mlp(stack: ExitStack, mlp: Any, mask: torch.Tensor, site: str) -> None:
    """`mask` is [intermediate_size]."""
    if site == "product":
        handles = [mlp.down_proj.register_forward_pre_hook(_multiply_input(mask))]
    elif hasattr(mlp, "gate_up_proj"):
        handles = [mlp.gate_up_proj.register_forward_hook(_multiply_output(torch.cat((mask, mask))))]
    else:
        handles = [module.register_forward_hook(_multiply_output(mask)) for module in (mlp.gate_proj, mlp.up_proj)]
    for handle in handles:
        stack.callback(handle.remove)


def _mask_experts(stack: ExitStack, experts: Any, mask: torch.Tensor, site: str) -> None:
    """`mask` is [num_experts, moe_intermediate_size]; `experts` a list of MLPs, or what Transformers makes of it."""
    if isinstance(experts, nn.ModuleList):
        for mlp, expert_mask in zip(experts, mask, strict=True):
            _mask_mlp(stack, mlp, expert_mask, site)
        return
    if experts.is_transposed and site != "product":
        raise ValueError("gpt-oss has no masks at gate_and_up; see site_problems in pruned_vllm/formats/masked.py")
    if masks_activations(experts):
        _mask_rows(stack, experts, mask, site)
        return
    if site == "product":  # down_proj [experts, hidden_size, width], or transposed
        name, factors = "down_proj", mask[:, :, None] if experts.is_transposed else mask[:, None, :]
    else:  # gate_up_proj [experts, 2 * width, hidden_size]: gate before up
        name, factors = "gate_up_proj", torch.cat((mask, mask), dim=1)[:, :, None]
    parametrize.register_parametrization(experts, name, _Multiplied(factors))
    stack.callback(parametrize.remove_parametrizations, experts, name, leave_parametrized=False)


def masks_activations(experts: Any) -> bool:
    """Whether masks multiply what these experts of Transformers compute, and leave their weights alone."""
    return experts.config._experts_implementation == "grouped_mm"


def _mask_rows(stack: ExitStack, experts: Any, mask: torch.Tensor, site: str) -> None:
    """Multiplies the rows that grouped experts hand to `_apply_gate`: each token once for each of its experts, sorted
    by expert."""
    apply_gate, rows = experts._apply_gate, torch.empty(0)

    def note_rows(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        nonlocal rows
        rows = args[1].flatten().sort().values

    def masked(gate_up: torch.Tensor) -> torch.Tensor:
        # In float32 until here: its gradient is a sum over tokens.
        factors = F.embedding(rows, mask.to(rows.device)).to(gate_up.dtype)
        return apply_gate(gate_up) * factors if site == "product" else apply_gate(gate_up * factors.repeat(1, 2))

    stack.callback(experts.register_forward_pre_hook(note_rows).remove)
    experts._apply_gate = masked  # hides the method of the class
    stack.callback(delattr, experts, "_apply_gate")


class _Multiplied(nn.Module):
    """A weight times factors, through which gradients flow."""

    def __init__(self, factors: torch.Tensor) -> None:
        super().__init__()
        self._factors = (factors,)  # in a tuple, so that it does not become a parameter of the model

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self._factors[0].to(weight.dtype)


def _multiply_input(mask: torch.Tensor):
    """Multiplies an input [..., units * size] by one factor a unit; size is head_dim for heads and 1 for channels."""

    def hook(module: nn.Module, args: tuple[torch.Tensor]):
        x = args[0]
        return ((x.unflatten(-1, (len(mask), -1)) * mask.to(x)[:, None]).flatten(-2),)

    return hook


def _multiply_output(mask: torch.Tensor):
    return lambda module, args, output: output * mask.to(output)
