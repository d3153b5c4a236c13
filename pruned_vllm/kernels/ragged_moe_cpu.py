"""Mixture-of-experts feed-forward on a CPU where every expert has its own width and nothing is padded to the widest.

`ragged_moe` takes what the Triton kernel takes. The work is done by ragged_moe_cpu.cpp, which is compiled on first
use, in some ten seconds, for the instructions that PyTorch uses on this CPU, and kept (see compilation.py). It needs a
C++ compiler (c++, or what CXX names) with OpenMP, as torch.compile does on a CPU; tested with GCC 12. Without one a
warning says so, and each expert is three matrix products.

Where the CPU multiplies bfloat16 numbers (AVX-512 BF16) these are not widened, and what enters the down projection is
rounded to bfloat16, as vLLM's own op does. AMX is not used.

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

import torch
import torch.nn.functional as F

from pruned_vllm.kernels.compilation import load_library
from pruned_vllm.kernels.ragged_moe_arguments import Scales, check_arguments, check_offsets

logger = logging.getLogger("vllm.pruned_vllm")  # under vLLM's own logging configuration

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
# By what PyTorch says of this CPU; others get what the compiler takes for granted.
INSTRUCTIONS = {
    "AVX512_BF16": ("-march=x86-64-v4", "-mavx512bf16"),
    "AVX512": ("-march=x86-64-v4",),
    "AVX2": ("-march=x86-64-v3",),
}
FUNCTIONS = {
    torch.float32: "ragged_moe_float32",
    torch.bfloat16: "ragged_moe_bfloat16",
    torch.float16: "ragged_moe_float16",
}


def ragged_moe(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    offsets: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    max_width: int,
    scales: Scales | None = None,
) -> torch.Tensor:
    """Sums the chosen experts' outputs, each times its router weight; the same input gives the same bits.

    Args and errors are those of `ragged_moe_triton.ragged_moe`; `max_width` is not needed here.
    Quantized weights (`scales`) are widened to float32 at every call.

    Raises:
        ValueError: also where an expert's rows are not among the rows of weights.
        MemoryError: two rows of float32 for each token, and the channels of its experts, did not fit.
    """
    if scales is not None:
        weights = _dequantized(gate_up, down, offsets, scales)
        return _matrix_products(x.float(), *weights, offsets, topk_weights, topk_ids).to(x.dtype)
    check_arguments(x, gate_up, down, offsets, topk_weights, topk_ids, max_width)
    num_experts, rows = len(offsets) - 1, len(down)
    check_offsets(offsets.tolist(), rows)
    library = _library()
    if library is None:
        return _matrix_products(x, gate_up, down, offsets, topk_weights, topk_ids)
    x, offsets, topk_weights = x.contiguous(), offsets.to(torch.int32), topk_weights.to(torch.float32).contiguous()
    if topk_ids.dtype != torch.int32:
        topk_ids = topk_ids.clamp(-1, num_experts).to(torch.int32)  # so that a huge id does not turn into another one
    topk_ids = topk_ids.contiguous()
    out = torch.empty_like(x)
    tensors = (x, gate_up, down, offsets, topk_weights, topk_ids, out)
    pointers = [tensor.data_ptr() for tensor in tensors]
    if getattr(library, FUNCTIONS[x.dtype])(*pointers, *x.shape, rows, num_experts, topk_ids.shape[1]):
        raise MemoryError(f"experts of {len(x)} tokens, {topk_ids.shape[1]} each, did not fit in memory")
    return out


def _dequantized(
    gate_up: torch.Tensor, down: torch.Tensor, offsets: torch.Tensor, scales: Scales
) -> tuple[torch.Tensor, torch.Tensor]:
    """gate_up [2, rows, hidden] and down [rows, hidden] in float32."""
    if gate_up.dtype == torch.uint8:
        gate_up, down = (torch.stack((w & 15, w >> 4), -1).flatten(-2).to(torch.int8) - 8 for w in (gate_up, down))
    groups = scales.gate_up.shape[-1]
    wide = (gate_up.float().unflatten(-1, (groups, -1)) * scales.gate_up[..., None]).flatten(-2)
    factors = torch.empty(down.shape)
    for expert, (start, end) in enumerate(pairwise(offsets.tolist())):
        first = int(scales.down_offsets[expert])
        size = scales.group_size or max(1, end - start)
        factors[start:end] = scales.down[first + torch.arange(end - start) // size]
    return wide, down.float() * factors


def _matrix_products(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    offsets: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
) -> torch.Tensor:
    out = torch.zeros(x.shape, dtype=torch.float32)
    for expert, (start, end) in enumerate(pairwise(offsets.tolist())):
        tokens, choices = torch.where(topk_ids == expert)
        if len(tokens) and start < end:
            gate, up = (x[tokens] @ weights[start:end].T for weights in gate_up)
            result = (F.silu(gate) * up) @ down[start:end]
            out.index_add_(0, tokens, result.float() * topk_weights[tokens, choices, None].float())
    return out.to(x.dtype)


def _capability() -> str:
    """A key of INSTRUCTIONS, or something else."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX512" and torch.cpu.get_capabilities().get("avx512_bf16"):
        return "AVX512_BF16"
    return capability


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled functions; None, with a warning, where they cannot be compiled."""
    flags = (*FLAGS, *INSTRUCTIONS.get(_capability(), ()))
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
        getattr(library, name).argtypes = [ctypes.c_void_p] * 7 + [ctypes.c_int64] * 5
    return library
