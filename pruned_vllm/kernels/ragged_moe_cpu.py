"""Mixture-of-experts feed-forward on a CPU where every expert has its own width and nothing is padded to the widest.

`ragged_moe` takes what the Triton kernel takes. The work is done by ragged_moe_cpu.cpp, which is compiled on first
use, in some ten seconds, for the instructions that PyTorch uses on this CPU, and kept (see compilation.py). It needs a
C++ compiler (c++, or what CXX names) with OpenMP, as torch.compile does on a CPU; tested with GCC 11 and 12. Without
one a warning says so, and each expert is three matrix products.

Where the CPU multiplies bfloat16 numbers (AVX-512 BF16, and VBMI) these are not widened, and what enters the down
projection is rounded to bfloat16, as vLLM's own op does. AMX is not used.

Quantized weights are read as they are stored, so that a few tokens take as long as reading half or a quarter of the
bytes does. They become numbers in registers: of the type of `x`, or float32 where that is what the CPU multiplies. Both
have every value of 8-bit integers and of e4m3fn, so nothing is rounded that would not be for weights like `x`; scales
multiply sums in float32. `x` is not quantized. Each kind of weights is a library of its own, and another one where
experts have biases or an activation other than silu.

Why not vLLM's own `cpu_fused_moe`: it wants all experts equally wide. One call for every class of similar widths, with
as many classes as are best, came to 0.8 of the ideal speedup. Why not PyTorch's matrix products for experts with many
tokens: they repack weights at every call, and are slow for bfloat16 without AVX-512, and for float16.
"""

import ctypes
import functools
import logging
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import get_args

import torch
import torch.nn.functional as F

from pruned_vllm.kernels.compilation import load_library
from pruned_vllm.kernels.ragged_moe_arguments import (
    SILU,
    Activation,
    ActivationName,
    Biases,
    Scales,
    check_arguments,
    check_down_offsets,
    check_offsets,
)

logger = logging.getLogger("vllm.pruned_vllm")  # under vLLM's own logging configuration

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
# By what PyTorch says of this CPU; others get what the compiler takes for granted.
INSTRUCTIONS = {
    "AVX512_BF16": ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vbmi"),
    "AVX512": ("-march=x86-64-v4",),
    "AVX2": ("-march=x86-64-v3",),
}
FUNCTIONS = {
    torch.float32: "ragged_moe_float32",
    torch.bfloat16: "ragged_moe_bfloat16",
    torch.float16: "ragged_moe_float16",
}
WRONG_OFFSETS = 2  # what these return where offsets lead outside of the weights or their scales
NO_SCALES = [0, 0, 0]  # null pointers
NO_BIASES = Biases()
WEIGHTS = {torch.int8: "Int8", torch.float8_e4m3fn: "Float8", torch.uint8: "Int4"}  # of ragged_moe_readers.h


class Extras(ctypes.Structure):
    """`Extras` of ragged_moe_epilogues.h."""

    _fields_ = (
        ("gate_up_bias", ctypes.c_void_p),
        ("down_bias", ctypes.c_void_p),
        ("activation", ctypes.c_int64),
        ("alpha", ctypes.c_float),
        ("limit", ctypes.c_float),
    )


def ragged_moe(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    offsets: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    max_width: int,
    scales: Scales | None = None,
    activation: Activation = SILU,
    biases: Biases | None = None,
) -> torch.Tensor:
    """Sums the chosen experts' outputs, each times its router weight; the same input gives the same bits.

    Args and errors are those of `ragged_moe_triton.ragged_moe`; `max_width` is not needed here, and
    `scales.quantize_input` changes nothing.

    Raises:
        ValueError: also where an expert's rows are not among the rows of weights, or its scales not among the scales.
        MemoryError: two rows of float32 for each token, and the channels of its experts, did not fit.
    """
    return RaggedMoe(gate_up, down, offsets, max_width, scales, activation, biases)(x, topk_weights, topk_ids)


class RaggedMoe:
    """`ragged_moe` for weights that stay where they are: what is asked of them is asked at the first call alone.

    The weights of a layer push what Python needs out of the caches, so a call of `ragged_moe` takes 0.1 to 0.2 ms
    besides computing, and one of this a quarter of that (two tokens, AMD EPYC with 8 MiB of cache).

    Args and errors are those of `ragged_moe`.
    """

    def __init__(
        self,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        offsets: torch.Tensor,
        max_width: int,
        scales: Scales | None = None,
        activation: Activation = SILU,
        biases: Biases | None = None,
    ) -> None:
        self.gate_up, self.down, self.offsets, self.max_width = gate_up, down, offsets, max_width
        self.scales, self.activation, self.biases = scales, activation, biases
        self._dtype: torch.dtype | None = None  # of x, once weights are found to fit it

    def __call__(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        """x [tokens, hidden], topk_weights and topk_ids [tokens, topk] -> [tokens, hidden]."""
        if not self._takes(x, topk_weights, topk_ids):
            weights = self.gate_up, self.down, self.offsets
            check_arguments(x, *weights, topk_weights, topk_ids, self.max_width, self.scales, self.biases)
            if x.numel() == 0:
                return torch.empty_like(x)
            if x.dtype != self._dtype and not self._choose_function(x):
                return _matrix_products(x, *weights, topk_weights, topk_ids, self.scales, self.activation, self.biases)
            x, topk_weights = x.contiguous(), topk_weights.to(torch.float32).contiguous()
            if topk_ids.dtype != torch.int32:  # a huge id must not turn into another one
                topk_ids = topk_ids.clamp(-1, len(self.offsets) - 1).to(torch.int32)
            topk_ids = topk_ids.contiguous()
        out = torch.empty_like(x)
        failure = self._function(
            x.data_ptr(), *self._pointers, topk_weights.data_ptr(), topk_ids.data_ptr(), out.data_ptr(), self._extras,
            len(x), *self._sizes, topk_ids.shape[1], self._group_size
        )  # fmt: skip
        if failure == WRONG_OFFSETS:
            _check_values(self.offsets, len(self.down), self.scales)  # says which
        if failure:
            raise MemoryError(f"experts of {len(x)} tokens, {topk_ids.shape[1]} each, did not fit in memory")
        return out

    def _takes(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> bool:
        """Whether the function may be called with what there is, in few steps."""
        shape = topk_ids.shape
        return (
            x.dtype == self._dtype
            and len(shape) == 2
            and x.shape == (shape[0], self._sizes[0])
            and x.numel() > 0
            and topk_weights.shape == shape
            and topk_weights.dtype == torch.float32
            and topk_ids.dtype == torch.int32
            and all(tensor.is_cpu and tensor.is_contiguous() for tensor in (x, topk_weights, topk_ids))
        )

    def _choose_function(self, x: torch.Tensor) -> bool:
        """Keeps the function for weights that fit `x`, and what it is called with. False: there is none."""
        scales, is_general = self.scales, self.biases is not None or self.activation.name != SILU.name
        library = _library(None if scales is None else WEIGHTS[self.down.dtype], is_general)
        if library is None or self.offsets.dtype != torch.int32:
            _check_values(self.offsets, len(self.down), scales)
        if library is None:
            return False
        self.offsets = self.offsets.to(torch.int32)
        tensors, runs, self._group_size = [self.gate_up, self.down, self.offsets], 0, 0
        if scales is not None:
            tensors += (scales.gate_up, scales.down, scales.down_offsets)
            runs, self._group_size = len(scales.down), scales.group_size or 0
        pointers = [tensor.data_ptr() for tensor in tensors]
        self._pointers = pointers if scales is not None else [*pointers, *NO_SCALES]
        self._sizes = (x.shape[1], len(self.down), runs, len(self.offsets) - 1)
        self._values = _extras(self.activation, self.biases or NO_BIASES) if is_general else None
        self._extras = 0 if self._values is None else ctypes.addressof(self._values)
        self._function = getattr(library, FUNCTIONS[x.dtype])
        self._dtype = x.dtype
        return True


def _extras(activation: Activation, biases: Biases) -> Extras:
    """Refers to the memory of `biases`, which must outlive it."""
    pointers = [None if bias is None else bias.data_ptr() for bias in (biases.gate_up, biases.down)]
    return Extras(*pointers, get_args(ActivationName).index(activation.name), activation.alpha, activation.limit)


def _check_values(offsets: torch.Tensor, rows: int, scales: Scales | None) -> None:
    """Raises ValueError where offsets would lead outside of the weights or their scales."""
    bounds = offsets.tolist()
    check_offsets(bounds, rows)
    if scales is not None:
        check_down_offsets(scales, bounds)


def _matrix_products(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    offsets: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    scales: Scales | None,
    activation: Activation,
    biases: Biases | None,
) -> torch.Tensor:
    out = torch.zeros(x.shape, dtype=torch.float32)
    gate_up_bias, down_bias = (None, None) if biases is None else (biases.gate_up, biases.down)
    # float32, so that scaled weights, and what is close to the limits of an activation, are not rounded to 16 bits.
    numbers = x if scales is None and biases is None and activation.name == SILU.name else x.float()
    for expert, (start, end) in enumerate(pairwise(offsets.tolist())):
        tokens, choices = torch.where(topk_ids == expert)
        chosen = topk_weights[tokens, choices, None].float()
        if len(tokens) and start < end:
            inputs, weights = numbers[tokens], (*gate_up[:, start:end], down[start:end])
            if scales is not None:
                weights = _scaled(weights, scales, expert, slice(start, end))
            gate, up, to_hidden = (weight.to(inputs.dtype) for weight in weights)
            gate, up = inputs @ gate.T, inputs @ up.T
            if gate_up_bias is not None:
                gate, up = gate + gate_up_bias[0, start:end], up + gate_up_bias[1, start:end]
            out.index_add_(0, tokens, (_activated(gate, up, activation) @ to_hidden).float() * chosen)
        if down_bias is not None:
            out.index_add_(0, tokens, chosen * down_bias[expert])
    return out.to(x.dtype)


def _activated(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    if activation.name == "swigluoai":
        gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
        return gate * torch.sigmoid(activation.alpha * gate) * (up + 1)
    if activation.name == "silu":
        return F.silu(gate) * up
    return F.gelu(gate, approximate="tanh" if activation.name == "gelu_tanh" else "none") * up


def _scaled(codes: tuple[torch.Tensor, ...], scales: Scales, expert: int, rows: slice) -> tuple[torch.Tensor, ...]:
    """The float32 weights of an expert: gate, up and down."""
    numbers = [
        torch.stack([part & 15, part >> 4], -1).flatten(-2).float() - 8 if part.dtype == torch.uint8 else part.float()
        for part in codes
    ]
    columns = scales.group_size or numbers[0].shape[1]
    gate, up = (
        part * scale.repeat_interleave(columns, 1)
        for part, scale in zip(numbers[:2], scales.gate_up[:, rows], strict=True)
    )
    first, last = scales.down_offsets[expert : expert + 2].tolist()
    channels = scales.group_size or len(gate)
    return gate, up, numbers[2] * scales.down[first:last].repeat_interleave(channels, 0)[: len(gate)]


def _capability() -> str:
    """A key of INSTRUCTIONS, or something else."""
    capability = torch.backends.cpu.get_cpu_capability()
    more = torch.cpu.get_capabilities()
    # Nearly all CPUs that multiply bfloat16 numbers have both; with VBMI, codes of 8 bits become such numbers.
    if capability == "AVX512" and more.get("avx512_bf16") and more.get("avx512_vbmi"):
        return "AVX512_BF16"
    return capability


@functools.cache
def _library(weights: str | None, is_general: bool) -> ctypes.CDLL | None:
    """The compiled functions, or None, with a warning, where they cannot be compiled.

    Args:
        weights: a value of WEIGHTS; None for weights like x.
        is_general: whether experts may have biases and any activation.
    """
    flags = [*FLAGS, *INSTRUCTIONS.get(_capability(), ())]
    if weights is not None:
        flags.append(f"-DWEIGHTS={weights}")
    if is_general:
        flags.append("-DGENERAL")
    try:
        library = load_library(SOURCE, flags)
    except (OSError, RuntimeError, ValueError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        logger.warning(
            "Experts of different widths run slowly: %s could not be compiled, or the result in "
            "${XDG_CACHE_HOME:-~/.cache}/pruned-vllm/kernels not be loaded. Install a C++ compiler with OpenMP (for "
            "example Debian's g++) or name one in CXX; delete a result that is damaged.\n%s",
            SOURCE.name,
            reason.strip()[:2000],
        )
        return None
    for name in FUNCTIONS.values():
        getattr(library, name).argtypes = [ctypes.c_void_p] * 11 + [ctypes.c_int64] * 7
    return library
