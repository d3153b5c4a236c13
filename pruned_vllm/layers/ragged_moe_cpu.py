"""Experts of different FFN widths on CPU: a few classes of similar width, one call of vLLM's fused op for each.

vLLM's `cpu_fused_moe` reads its experts at one width, so the widest sets the price of all. Here experts of similar
width share a class, padded to the widest of the class; a step sorts its routed (token, expert) pairs by class and calls
the op once for each class that has any. `width_classes` finds the classes that cost least.

    experts = RaggedExpertsCPU(gate_up, down, offsets, top_k=8)    # packs; gate_up and down may go now
    y = experts(x, topk_weights, topk_ids)

Notable:
- The op does not check expert ids: one outside the class writes outside its buffers. Pairs that are routed nowhere
  (id -1, width 0) must therefore never reach it.
- Two designs lost against this one, in bfloat16: cutting experts into slices of one width, all in one call (its
  float32 buffer of one row for each slice costs more than the calls do), and plain matrix products for each expert
  without any padding (slower than padding everything to the widest).
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
import torch

from pruned_vllm.errors import InputError

# The op takes widths and hidden sizes in multiples of 32 on every instruction set (16 would do on POWER).
ALIGNMENT = 32

# The op computes the offset of an expert's weights in 32 bits.
MAX_CLASS_ELEMENTS = 2**31 - 1

# What one more class costs a step of one token, in bytes of weights that could have been read instead. A call takes
# about 12 microseconds, 0.3 MB at a core's 28 GB/s (AMD EPYC with AVX-512), but of ten classes one token calls about
# six. The optimum is flat: between 0.1 and 0.3 MB, 15 to 9 classes, steps took the same time.
CALL_COST_BYTES = 200_000


def width_classes(
    widths: Sequence[int], hidden_size: int, element_bytes: int, call_cost_bytes: int, top_k: int = 8
) -> list[list[int]]:
    """Sorts experts into the classes of width that cost a decoding step least; every expert of a class is padded to
    its widest.

    The cost is that of a step of one token, where calls weigh most against weights:

        top_k / E * sum over experts of the bytes at the width of their class  +  call_cost_bytes * number of classes

    A token reads top_k of the E experts, each as likely as any other. A batch reads more experts with the same number
    of calls, so its calls weigh less. The result is exact: some optimum has classes that are runs of the sorted
    widths, and a dynamic program tries all of these.

    Args:
        widths: channels of each expert; an expert of width 0 belongs to no class.
        hidden_size: inputs and outputs of an expert.
        element_bytes: size of one weight.
        call_cost_bytes: what one more class costs, as bytes of weights read in that time.
        top_k: experts of each token.

    Returns:
        Classes by increasing width, each a list of increasing indices of experts.
    """
    channel_bytes = 3 * hidden_size * element_bytes * min(top_k, len(widths))
    call_bytes = call_cost_bytes * len(widths)  # both sides of the cost times E, to stay in integers
    by_width: dict[int, list[int]] = {}
    for expert, width in enumerate(widths):
        if width:
            by_width.setdefault(aligned(width), []).append(expert)
    distinct = sorted(by_width)
    experts_below = [0, *accumulate(len(by_width[width]) for width in distinct)]

    best = [0]  # best[end]: cost of the classes of distinct[:end]
    start_of = [0]  # where the last of these begins
    for end, width in enumerate(distinct, start=1):
        costs = [
            best[start] + call_bytes + (experts_below[end] - experts_below[start]) * width * channel_bytes
            for start in range(end)
        ]
        best.append(min(costs))
        start_of.append(costs.index(best[end]))

    classes = []
    end = len(distinct)
    while end:
        start = start_of[end]
        classes.append(sorted(expert for width in distinct[start:end] for expert in by_width[width]))
        end = start
    return classes[::-1]


def aligned(width: int) -> int:
    """The least width that the op takes and that has room for this one."""
    return -(-width // ALIGNMENT) * ALIGNMENT


class RaggedExpertsCPU:
    """The experts of one layer, packed for vLLM's CPU op; the router is not part of it.

    Each computes down(silu(gate(x)) * up(x)). Nothing of the arguments is kept.

    Args:
        gate_up: [2, R, hidden], gate and up projections; R is the sum of all widths, expert after expert. float32,
            bfloat16 or float16.
        down: [R, hidden], down projections, transposed, in the same order.
        offsets: [E + 1]; expert e has the rows from offsets[e] up to offsets[e + 1].
        top_k: experts of each token; chooses the classes, calls may bring any number.

    Raises:
        InputError: a shape, type or size that the op does not take.
    """

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor, offsets: Sequence[int], top_k: int = 8) -> None:
        from vllm._custom_ops import cpu_fused_moe

        offsets = [int(offset) for offset in offsets]
        _check(gate_up, down, offsets)
        self.hidden_size = down.shape[1]
        self.num_experts = len(offsets) - 1
        self.dtype = down.dtype
        widths = [end - start for start, end in pairwise(offsets)]
        classes = width_classes(widths, self.hidden_size, down.element_size(), CALL_COST_BYTES, top_k)
        self._fused_moe = cpu_fused_moe
        self._isa = _instruction_set(down.dtype)
        self._packed = [
            _pack(gate_up, down, [(offsets[expert], offsets[expert + 1]) for expert in experts], self._isa)
            for experts in classes
        ]
        # Experts in the order of their classes have a rank. One without a class has the last, and so has, at the end
        # of the table, what is no expert.
        self._first_ranks = np.cumsum([0, *map(len, classes)])
        self._rank_of_expert = np.full(self.num_experts + 1, self._first_ranks[-1])
        self._rank_of_expert[[expert for experts in classes for expert in experts]] = range(self._first_ranks[-1])
        indices = [index for experts in classes for index in range(len(experts))]
        self._index_in_class = np.array([*indices, 0], dtype=np.int32)

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed weights, padding included."""
        return sum(weight.nbytes for packed in self._packed for weight in packed)

    def __call__(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        """Sums the routed experts' outputs, each times its router weight.

        Args:
            x: [T, hidden], of the weights' dtype.
            topk_weights: [T, K], float32.
            topk_ids: [T, K], integers; one that is no expert, such as -1, is routed nowhere.

        Returns:
            [T, hidden]; the same input gives the same bits.
        """
        num_tokens, top_k = topk_ids.shape
        # Seen as unsigned, -1 is a large number: one minimum maps all that is no expert to the end of the table.
        ids = topk_ids.to(torch.int32).numpy().view(np.uint32).ravel()
        ranks = self._rank_of_expert[np.minimum(ids, self.num_experts)]
        order = ranks.argsort(kind="stable")
        ranks = ranks[order]
        bounds = ranks.searchsorted(self._first_ranks).tolist()
        inputs = x.index_select(0, torch.from_numpy(order // top_k))
        weights = torch.from_numpy(topk_weights.numpy().ravel()[order, None])
        indices = torch.from_numpy(self._index_in_class[ranks, None])
        outputs = torch.empty_like(inputs)
        for packed, (start, end) in zip(self._packed, pairwise(bounds), strict=True):
            if start < end:
                run = slice(start, end)
                self._fused_moe(
                    outputs[run], inputs[run], *packed, None, None, weights[run], indices[run], "silu", self._isa
                )
        if bounds[-1] < len(order):
            outputs[bounds[-1] :] = 0
        if num_tokens == 1:
            return outputs.sum(0, keepdim=True)
        pair_order = torch.from_numpy(order.argsort(kind="stable"))
        return outputs.index_select(0, pair_order).view(num_tokens, top_k, self.hidden_size).sum(1)


def _pack(
    gate_up: torch.Tensor, down: torch.Tensor, rows: list[tuple[int, int]], isa: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """One class as the op wants it; zero padding changes no output, since silu(0) * 0 = 0."""
    from vllm._custom_ops import cpu_prepack_moe_weight

    hidden_size = down.shape[1]
    class_width = aligned(max(end - start for start, end in rows))
    if 2 * len(rows) * class_width * hidden_size > MAX_CLASS_ELEMENTS:
        raise InputError(
            f"{len(rows)} experts of up to {class_width} channels and hidden size {hidden_size} are more than the "
            f"2^31 weights that vLLM's CPU kernel can address; use tensor parallelism"
        )
    gate_up_padded = gate_up.new_zeros(len(rows), 2, class_width, hidden_size)
    down_padded = down.new_zeros(len(rows), hidden_size, class_width)
    for index, (start, end) in enumerate(rows):
        gate_up_padded[index, :, : end - start] = gate_up[:, start:end]
        down_padded[index, :, : end - start] = down[start:end].T
    return cpu_prepack_moe_weight(gate_up_padded.flatten(1, 2), isa), cpu_prepack_moe_weight(down_padded, isa)


def _instruction_set(dtype: torch.dtype) -> str:
    """The op's name for the fastest instructions of this CPU, as vLLM's own layer chooses them."""
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    if dtype == torch.bfloat16:  # the others end the process on any other type
        for experts in (
            cpu_moe.X86CPUUnquantizedExperts,
            cpu_moe.ArmCPUUnquantizedExperts,
            cpu_moe.PowerCPUUnquantizedExperts,
        ):
            if experts._supports_current_device():
                return experts.isa
    return cpu_moe.CPUUnquantizedExperts.isa


def _check(gate_up: torch.Tensor, down: torch.Tensor, offsets: list[int]) -> None:
    problems = []
    if down.dim() != 2 or tuple(gate_up.shape) != (2, *down.shape):
        problems.append(f"gate_up {list(gate_up.shape)} and down {list(down.shape)} must be [2, R, H] and [R, H]")
    elif down.shape[1] % ALIGNMENT:
        problems.append(f"hidden size {down.shape[1]}: vLLM's CPU kernel takes multiples of {ALIGNMENT} only")
    if not offsets or offsets[0] != 0 or sorted(offsets) != offsets or offsets[-1] != len(down):
        problems.append(f"offsets {offsets} must rise from 0 to the {len(down)} rows of down")
    if gate_up.dtype != down.dtype or down.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        problems.append(f"gate_up is {gate_up.dtype}, down {down.dtype}: must be float32, bfloat16 or float16, both")
    if problems:
        raise InputError("These experts cannot run on CPU:", problems)
