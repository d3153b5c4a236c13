"""What a quantized model computes: a float32 model of Hugging Face with rounded weights, whose inputs are rounded."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType

import torch
from helpers.compressed import FP8, INPUT_SCALE, Scheme, is_quantized
from helpers.tiny import prompts
from torch import nn


def quantize_inputs(x: torch.Tensor, scheme: Scheme, most: float = 127) -> torch.Tensor:
    """Rounds inputs as the scheme does, in float32; `most` is what the largest int8 one of a token becomes."""
    most = 448 if scheme.is_float else most
    scale = INPUT_SCALE if scheme.is_static else (x.float().abs().amax(-1, keepdim=True) / most).clamp_min(1e-12)
    numbers = x.float() / scale
    return (numbers.to(FP8).float() if scheme.is_float else numbers.round().clamp(-128, 127)) * scale


@contextmanager
def inputs_quantized(
    model: nn.Module,
    scheme: Scheme,
    experts: bool = False,
    most: float = 127,
    shares: Mapping[str, list[list[int]]] = MappingProxyType({}),
) -> Iterator[None]:
    """While it lasts, the projections of `model` round their inputs.

    Args:
        experts: also those of experts, which vLLM leaves as they are on a CPU.
        most: what the largest of a token's int8 inputs becomes: 127 in vLLM, 127.5 in compressed-tensors.
        shares: of projections whose inputs are on several ranks, the inputs of each: a rank scales its own.
    """

    def rounding(projection: str, _, inputs: tuple) -> tuple:
        rounded = inputs[0].clone()
        for share in shares.get(projection, [list(range(rounded.shape[-1]))]):
            rounded[..., share] = quantize_inputs(inputs[0][..., share], scheme, most)
        return (rounded,)

    hooks = []
    if scheme.inputs is not None:
        for name, module in model.named_modules():
            projection = name.removesuffix(".base_layer")  # what PEFT makes of one
            if (
                isinstance(module, nn.Linear)
                and is_quantized(projection, scheme)
                and (experts or ".experts." not in name)
            ):
                hooks.append(module.register_forward_pre_hook(partial(rounding, projection)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def log_probabilities(model: nn.Module, tokens: list[int]) -> torch.Tensor:
    """[len(tokens) - 1, vocabulary], of what follows each token but the last."""
    return model(input_ids=torch.tensor([tokens])).logits[0, :-1].float().log_softmax(-1)


def differences(outputs: list, expected: Callable[[list[int]], torch.Tensor]) -> torch.Tensor:
    """|served log-probability - expected one| of every token that vLLM tells of, teacher-forced on what it served."""
    found = []
    for prompt, output in zip(prompts(), outputs, strict=True):
        reference = expected([*prompt, *output.outputs[0].token_ids])
        served = [*(output.prompt_logprobs or ())[1:], *output.outputs[0].logprobs]
        for position, logprobs in enumerate(served, len(reference) - len(served)):
            found += [abs(entry.logprob - reference[position, token].item()) for token, entry in logprobs.items()]
    return torch.tensor(found)


def emulated_differences(outputs: list, model: nn.Module, scheme: Scheme, **options) -> torch.Tensor:
    """`differences` to the float32 emulation of the scheme by a Hugging Face model with its rounded weights.

    Args:
        options: of `inputs_quantized`.
    """
    with inputs_quantized(model, scheme, **options):
        return differences(outputs, lambda tokens: log_probabilities(model, tokens))
