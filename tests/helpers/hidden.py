"""Masks of hidden dimensions on a running Hugging Face model: the oracle of what convert-pruned makes of them."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from transformers import PreTrainedModel

from converter.source import HiddenMask


@contextmanager
def hidden_masks(model: PreTrainedModel, mask: HiddenMask) -> Iterator[None]:
    """While it lasts, the model computes what a project that trained with these masks and norms computed."""
    size = model.config.hidden_size
    seen = mask.norms != 0 if mask.norm_sees_kept else torch.ones(size, dtype=torch.bool)
    divisor = mask.norm_divisor or int(seen.sum())
    norms = [model.model.norm]
    with ExitStack() as stack:
        _multiply_output(stack, model.model.embed_tokens, mask.embedding)
        for layer in model.model.layers:
            norms += [layer.input_layernorm, layer.post_attention_layernorm]
            _multiply_output(stack, layer.self_attn, mask.outputs)
            _multiply_output(stack, layer.mlp, mask.outputs)
        for norm in norms:
            norm.forward = _masked_norm(norm.weight, model.config.rms_norm_eps, seen, divisor, mask.norms)
            stack.callback(norm.__dict__.pop, "forward")
        yield


def _masked_norm(weight, eps, seen, divisor, factors):
    def forward(x: torch.Tensor) -> torch.Tensor:
        variance = x[..., seen].pow(2).sum(-1, keepdim=True) / divisor
        result = x * torch.rsqrt(variance + eps) * weight
        return result if factors is None else result * factors

    return forward


def _multiply_output(stack: ExitStack, module: torch.nn.Module, factors: torch.Tensor | None) -> None:
    if factors is None:
        return

    def hook(module, args, output):
        return (output[0] * factors, *output[1:]) if isinstance(output, tuple) else output * factors

    stack.callback(module.register_forward_hook(hook).remove)


def hidden_z(size: int, kept: int, seed: int = 3) -> torch.Tensor:
    """A mask of hidden dimensions [size] with `kept` values that are not 0, chosen by chance, below 1 as learned."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(size)
    mask[torch.randperm(size, generator=generator)[:kept]] = 0.3 + 0.7 * torch.rand(kept, generator=generator)
    return mask
