"""Ways to compute one layer's routed experts, with the same random weights, for bench/ragged_moe.py.

    for contestant in contestants(RandomExperts(layer, "cuda"), ["int8"]):
        contestant.run(x, topk_weights, topk_ids)

"ragged" is what the served model runs, "ragged int8" and the like what it runs with quantized experts. "dense" is the
layer before pruning and "widest" the pruned one padded to its widest expert, both by vLLM's fused op: `cpu_fused_moe`
on CPU, its Triton kernel `fused_experts` on CUDA. It has tuned tiles for some GPUs and widths, mostly those of dense
models, and defaults elsewhere; vLLM may serve with other kernels. "dense, same kernel" is the layer before pruning by
the kernel of "ragged", so that tiles and tuning cancel out; without vLLM that kernel computes "widest", too, and there
is no other "dense".

With TRITON_INTERPRET=1 the kernel for GPUs runs in CPU memory, beside vLLM's op for CPUs: times mean nothing then, but
outputs are compared.
"""

import os
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch

from bench.experts.layers import Layer
from bench.experts.quantized import SCHEMES, expert_bytes, quantize
from pruned_vllm.kernels.huge_pages import prefer_huge_pages
from pruned_vllm.kernels.ragged_moe_arguments import Scales

Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
DTYPE = torch.bfloat16


class Contestant(NamedTuple):
    """One implementation.

    Attributes:
        run: x [tokens, hidden_size], router weights [tokens, top_k] float32, ids [tokens, top_k] int32 -> like x.
        widths: channels that it reads of each expert, padding included.
        expert_bytes: what it reads of each expert, scales included.
        is_pruned: whether it computes the pruned layer; else the one before.
        scheme: how its weights are quantized, a key of SCHEMES; "": they are bfloat16.
        tolerance: how far outputs may be from those of the first with the same weights, as a share of the largest.
    """

    name: str
    run: Run
    widths: tuple[int, ...]
    expert_bytes: tuple[int, ...]
    is_pruned: bool
    scheme: str = ""
    tolerance: float = 0.05  # bfloat16 rounds differently


class RandomExperts:
    """A layer's routed experts before pruning; pruned, expert e keeps its first widths[e] channels.

    Attributes:
        gate_up: [2, num_experts, full_width, hidden_size]
        down: [num_experts, full_width, hidden_size], transposed
    """

    def __init__(self, layer: Layer, device: str) -> None:
        self.layer, self.device = layer, device
        shape = (len(layer.widths), layer.full_width, layer.hidden_size)
        self.gate_up = torch.empty(2, *shape, dtype=DTYPE, device=device).normal_(std=layer.hidden_size**-0.5)
        self.down = torch.empty(shape, dtype=DTYPE, device=device).normal_(std=layer.full_width**-0.5)

    def rows(self, widths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """gate_up [2, rows, hidden_size], down [rows, hidden_size] and offsets with these widths, nothing padded."""
        kept = torch.arange(self.layer.full_width) < torch.tensor(widths)[:, None]
        index = kept.flatten().nonzero().squeeze(1).to(self.device)
        gate_up = self.gate_up.flatten(1, 2).index_select(1, index)
        return gate_up, self.down.flatten(0, 1).index_select(0, index), [0, *accumulate(widths)]

    def stacked(self, width: int, widths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights as vLLM stacks them, [experts, 2 * width, hidden_size] and [experts, hidden_size, width], with zeros
        beyond each expert's own width."""
        kept = (torch.arange(width) < torch.tensor(widths)[:, None])[..., None].to(self.device)
        gate_up = torch.where(kept, self.gate_up[:, :, :width], 0).transpose(0, 1).flatten(1, 2)
        return gate_up.contiguous(), torch.where(kept, self.down[:, :width], 0).mT.contiguous()


def contestants(experts: RandomExperts, schemes: Sequence[str] = ()) -> list[Contestant]:
    """All that can run where the experts are; "ragged" comes first. Each has a copy of the weights.

    Args:
        schemes: keys of SCHEMES; the pruned layer runs with weights quantized like that, too.
    """
    layer = experts.layer
    full, padded = ((width,) * len(layer.widths) for width in (layer.full_width, layer.widest))
    of_pruned, of_full, of_padded = (
        expert_bytes(widths, layer.hidden_size, None) for widths in (layer.widths, full, padded)
    )
    rows = experts.rows(layer.widths)
    found = [Contestant("ragged", _ragged(*rows), layer.widths, of_pruned, True)]
    for name in schemes:
        gate_up, down, scales = quantize(*rows, SCHEMES[name])
        run = _ragged(gate_up, down, rows[2], scales)
        read = expert_bytes(layer.widths, layer.hidden_size, SCHEMES[name])
        found.append(
            Contestant(f"ragged {name}", run, layer.widths, read, True, name, SCHEMES[name].tolerance),
        )
    found.append(Contestant("dense, same kernel", _ragged(*experts.rows(full)), full, of_full, False))
    try:
        fused = _fused_cpu() if experts.device == "cpu" else _fused_cuda()
    except ImportError:
        weights = experts.stacked(layer.widest, layer.widths)
        return [*found, Contestant("widest, same kernel", _padded_same_kernel(*weights), padded, of_padded, True)]
    return [
        *found,
        Contestant("dense", fused(*experts.stacked(layer.full_width, full)), full, of_full, False),
        Contestant("widest", fused(*experts.stacked(layer.widest, layer.widths)), padded, of_padded, True),
    ]


def _fused_cpu() -> Callable[[torch.Tensor, torch.Tensor], Run]:
    from vllm._custom_ops import cpu_fused_moe, cpu_prepack_moe_weight
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    # The fastest instructions of this CPU, chosen as vLLM's own layer does.
    choices = (cpu_moe.X86CPUUnquantizedExperts, cpu_moe.ArmCPUUnquantizedExperts, cpu_moe.PowerCPUUnquantizedExperts)
    supported = [experts.isa for experts in choices if experts._supports_current_device()]
    isa = (supported or [cpu_moe.CPUUnquantizedExperts.isa])[0]

    def fused(gate_up: torch.Tensor, down: torch.Tensor) -> Run:
        packed = [cpu_prepack_moe_weight(weight, isa) for weight in (gate_up, down)]

        def run(x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
            out = torch.empty_like(x)
            cpu_fused_moe(out, x, *packed, None, None, topk_weights, topk_ids, "silu", isa)
            return out

        return run

    return fused


def _padded_same_kernel(gate_up: torch.Tensor, down: torch.Tensor) -> Run:
    """Experts as `RandomExperts.stacked` returns them: to the kernel they are all equally wide."""
    num_experts, _, width = down.shape
    rows = gate_up.unflatten(1, (2, width)).transpose(0, 1).flatten(1, 2).contiguous()
    return _ragged(rows, down.mT.flatten(0, 1).contiguous(), range(0, (num_experts + 1) * width, width))


def _ragged(gate_up: torch.Tensor, down: torch.Tensor, offsets: Sequence[int], scales: Scales | None = None) -> Run:
    bounds = torch.tensor(offsets, dtype=torch.int32, device=down.device)
    max_width = max(end - start for start, end in pairwise(offsets))
    weights = _as_loaded(gate_up), _as_loaded(down), bounds
    if down.is_cpu and os.environ.get("TRITON_INTERPRET") != "1":
        from pruned_vllm.kernels.ragged_moe_cpu import RaggedMoe

        return RaggedMoe(*weights, max_width, scales)
    from pruned_vllm.kernels.ragged_moe_triton import ragged_moe

    return lambda x, topk_weights, topk_ids: ragged_moe(x, *weights, topk_weights, topk_ids, max_width, scales)


def _as_loaded(weights: torch.Tensor) -> torch.Tensor:
    """A copy in memory like that of a served model's experts."""
    memory = torch.empty_like(weights)
    prefer_huge_pages(memory)
    return memory.copy_(weights)


def _fused_cuda() -> Callable[[torch.Tensor, torch.Tensor], Run]:
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    return lambda gate_up, down: (
        lambda x, topk_weights, topk_ids: fused_experts(x, gate_up, down, topk_weights, topk_ids)
    )
