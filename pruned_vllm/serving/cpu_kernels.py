"""Refuses quantized layers for which vLLM has no kernel on this CPU, before it starts a process.

vLLM asks its kernels while it builds a layer, in a worker, and its answer names no layer and no fix; some kernels of
its CPU build are there by name alone and fail in the first forward pass. On GPUs vLLM answers itself.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.quantization import JOINED, Scheme, WeightScheme
from pruned_vllm.formats.quantized_tensors import linear_scheme
from pruned_vllm.serving.model_layout import CPU_PACKED_MULTIPLE, ModelLayout

if TYPE_CHECKING:  # this file is imported while the plugin registers, before vLLM may be set up
    from vllm.config import VllmConfig

_OTHER_SCHEMES = "fp8-dynamic and w8a8-int8 have kernels for every size"


def check_kernels(vllm_config: "VllmConfig", layout: ModelLayout, names: frozenset[str]) -> None:
    """Asks vLLM's kernels about every linear layer of a quantized checkpoint.

    Args:
        names: of the tensors of the checkpoint, as far as they are known; they tell which layers of GPTQ and AWQ are
            quantized.

    Raises:
        InputError: a layer for which there is none, with its size on each rank, the reasons and the fix.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    problems = list(_online_problems(vllm_config))
    answers: dict[tuple[Any, ...], str] = {}
    for module, scheme, inputs, outputs in _linear_layers(layout, names):
        size = (scheme, inputs, outputs)
        if size not in answers:
            answers[size] = _reason_against(*size)
            if answers[size]:
                problems.append(f"{module} [{outputs} outputs, {inputs} inputs on each rank]: {answers[size]}")
    if problems:
        raise InputError("vLLM's CPU build cannot compute layers that are quantized so:", problems)


def _online_problems(vllm_config: "VllmConfig") -> Iterator[str]:
    """Ways of quantizing linear layers while loading that vLLM's CPU build lacks, or begins and cannot end."""
    import torch
    from vllm.config.quantization import QUANT_KEY_NAMES

    model = vllm_config.model_config
    if model.quantization is None or _is_stored(vllm_config):
        return
    arguments = model.quantization_config or _shorthand(model.quantization)
    asked = [] if arguments is None else [arguments, *map(_shorthand, set((arguments.targets or {}).values()))]
    names = {key: name for name, key in QUANT_KEY_NAMES.items()}
    weights = {spec.linear.weight for spec in asked if spec is not None and spec.linear is not None}
    for name in sorted({names.get(weight, model.quantization) for weight in weights}):
        has_blocks = name == "fp8_per_block_static" and torch.cpu._is_amx_tile_supported()
        if name != "fp8_per_channel_static" and not has_blocks:
            needs_amx = ", which needs AMX" if name == "fp8_per_block_static" else ""
            yield f"{name} of linear layers, while they are loaded{needs_amx}; use --quantization fp8_per_channel"


def _shorthand(name: str) -> Any:
    """What a name of --quantization stands for."""
    from vllm.config.quantization import resolve_quantization_config

    return resolve_quantization_config(name, {})


def _is_stored(vllm_config: "VllmConfig") -> bool:
    """Whether the checkpoint itself is quantized."""
    return getattr(vllm_config.model_config.hf_config, "quantization_config", None) is not None


def _linear_layers(layout: ModelLayout, names: frozenset[str]) -> Iterator[tuple[str, Scheme, int, int]]:
    """Every quantized linear layer of the decoder as vLLM builds it on a rank: name, scheme, inputs and outputs."""
    geometry = layout.geometry
    if layout.quantization is None:
        return
    for number, (layer, sizes) in enumerate(zip(geometry.layers, layout.layers, strict=True)):
        prefix, hidden, head_dim = f"model.layers.{number}", geometry.hidden_size, geometry.head_dim
        found: dict[str, tuple[int, int]] = {}
        if geometry.latent is not None:
            linears = geometry.latent.linear_shapes(hidden, sizes.query_heads) if layer.num_key_value_heads else {}
            found |= {module: (inputs, outputs) for module, (outputs, inputs) in linears.items()}
        elif layer.num_key_value_heads:
            heads = sizes.query_heads
            query_rows = heads * geometry.family.query_rows(head_dim)
            found["self_attn.qkv_proj"] = (hidden, query_rows + 2 * sizes.kv_heads * head_dim)
            found["self_attn.o_proj"] = (heads * head_dim, hidden)
        if sizes.channels:
            mlp = geometry.family.mlp_of(layer)
            found[f"{mlp}.gate_up_proj"] = (hidden, 2 * sizes.channels)
            found[f"{mlp}.down_proj"] = (sizes.channels, hidden)
        for name, (inputs, outputs) in found.items():
            parent, _, last = name.rpartition(".")
            stored = f"{prefix}.{parent}.{JOINED.get(last, (last,))[0]}"
            scheme = linear_scheme(geometry, layout.quantization, stored)
            if scheme is not None and (not layout.quantization.by_tensors or f"{stored}.qweight" in names):
                yield f"{prefix}.{name}", scheme, inputs, outputs


def _reason_against(scheme: Scheme, inputs: int, outputs: int) -> str:
    """Why vLLM's CPU build has no kernel for such a layer, and what helps; "" if it has one, or nobody knows here."""
    if not isinstance(scheme, WeightScheme):
        return ""
    if scheme.layout == "plain":
        return _reason_against_plain(scheme)
    if scheme.group_size is not None and inputs % scheme.group_size:
        fix = f"quantize-pruned pads, or convert with --align {scheme.group_size}"
        return f"groups of {scheme.group_size} do not divide its inputs; {fix}"
    if scheme.inputs != "none":
        return ""
    from vllm import _custom_ops  # noqa: F401  registers what the CPU build has

    if scheme.num_bits == 4 and not _has_op("cpu_gemm_wna16"):
        return f"its kernel for 4 bits needs AVX-512, which this machine has not; {_OTHER_SCHEMES}"
    if reason := _packed_kernel_reason(scheme, inputs, outputs):
        if scheme.num_bits != 4:
            return f"{reason}; quantize to 4 bits, or {_OTHER_SCHEMES}"
        multiple = math.lcm(CPU_PACKED_MULTIPLE, scheme.group_size or 1)
        return f"{reason}; quantize-pruned pads, or convert with --align {multiple}, or {_OTHER_SCHEMES}"
    return ""


def _packed_kernel_reason(scheme: WeightScheme, inputs: int, outputs: int) -> str:
    """What the last of vLLM's kernels says, the one that is for every CPU; "" where any takes the layer."""
    import torch
    from vllm.model_executor.kernels.linear import MPLinearLayerConfig, choose_mp_linear_kernel
    from vllm.scalar_type import ScalarType

    bias = 1 << (scheme.num_bits - 1)
    config = MPLinearLayerConfig(
        full_weight_shape=(inputs, outputs),
        partition_weight_shape=(inputs, outputs),
        weight_type=ScalarType.uint(scheme.num_bits, bias if scheme.symmetric else None),
        act_type=torch.bfloat16,
        group_size=scheme.group_size or -1,
        zero_points=not scheme.symmetric,
    )
    try:
        choose_mp_linear_kernel(config)
    except ValueError as error:
        return str(error).splitlines()[-1].rpartition(" cannot implement due to: ")[2]
    return ""


def _reason_against_plain(scheme: WeightScheme) -> str:
    import torch

    if scheme.number == "int":
        return ""
    if scheme.inputs == "none":
        return "it has no kernel for fp8 weights with inputs that are not quantized; quantize with fp8-dynamic"
    if scheme.strategy == "block" and not torch.cpu._is_amx_tile_supported():
        return "its kernel for blocks of fp8 needs AMX, which this machine has not; quantize with fp8-dynamic"
    if scheme.strategy == "tensor" and _is_stub("static_scaled_fp8_quant"):
        return "it has no op for fp8 weights with one scale for a tensor; quantize with fp8-dynamic"
    return ""


def _has_op(name: str) -> bool:
    import torch

    return hasattr(torch.ops._C, name)


def _is_stub(name: str) -> bool:
    """Whether an op is missing, or there by name alone: it takes no arguments."""
    import torch
    from vllm import _custom_ops  # noqa: F401  registers what the CPU build has

    return not _has_op(name) or not getattr(torch.ops._C, name).default._schema.arguments
