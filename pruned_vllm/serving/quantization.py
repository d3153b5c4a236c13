"""Refuses a quantization that changes no weight of the model, which vLLM would pass over without a word."""

from torch import nn

from pruned_vllm.common.errors import InputError


def check_quantized(model: nn.Module, quantization: str | None) -> None:
    """Demands that `quantization` (a name of vLLM's, None for none) reached some layer of the finished `model`.

    Raises:
        InputError: every layer would stay in 16 or 32 bits.
    """
    methods = {type(module.quant_method).__name__ for module in model.modules() if hasattr(module, "quant_method")}
    if quantization is not None and all(name.startswith("Unquantized") for name in methods):
        raise InputError(
            f"quantization {quantization!r} changes no layer of this pruned model: it is for layers that the model has "
            "not, or ignores all that it has; serve the model without it, or choose another"
        )
