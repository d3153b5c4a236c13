"""Ragged mixture-of-experts: a reference in float64, the most that rounding may cost, and checked calls.

Imports Triton only inside of functions: a process that shall interpret kernels must set TRITON_INTERPRET before.
"""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from pruned_vllm.kernels.ragged_moe_arguments import SILU, Activation, Biases
from pruned_vllm.kernels.ragged_moe_config import Config


class Case(NamedTuple):
    """Sizes and kind of routing: "router" (distinct experts for a token), "any" (also twice the same expert, -1, and
    ids beyond the last), "one" (all pairs to expert 1), "nowhere"."""

    tokens: int
    hidden: int
    widths: tuple[int, ...]
    topk: int
    routing: str = "router"


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MANY = tuple(7 * i % 23 for i in range(32))  # 0 to 22, unordered
CASES = (
    Case(0, 16, (5, 3), 2),
    Case(1, 16, (1,), 1),
    Case(1, 40, (3, 0, 5, 17, 1, 0, 4, 9), 2),
    Case(1, 40, (3, 0, 5, 17, 1, 0, 4, 9), 2, "any"),
    Case(1, 72, MANY, 8),
    Case(2, 40, MANY, 4, "any"),
    Case(2, 16, (7, 0, 1), 1),
    Case(2, 1100, (3, 5), 2),  # more hidden units than one program sums up
    Case(7, 1, (3, 2), 2),
    Case(7, 40, (33, 0, 5, 64), 2),
    Case(7, 72, (0, 0, 200, 0), 4),
    Case(7, 16, (4, 4), 2, "nowhere"),
    Case(33, 16, (0, 0, 0), 2),
    Case(33, 24, (70,), 1),
    Case(33, 40, (3, 1, 31, 17, 0, 2), 4, "any"),
    Case(17, 56, MANY, 8),
    Case(70, 16, (5, 48, 0, 17), 8, "any"),  # more pairs than one step of the schedule takes in small batches
    Case(70, 16, (1, 20, 3), 2, "one"),
    Case(70, 40, (65, 130), 1),
    Case(70, 72, (16, 32, 48, 64), 2),
)

# For the CPU: what passes over weights more than once, ends within a vector or a panel, or has rows that are no
# multiple of a cache line.
MORE_CASES = (
    Case(9, 1056, (31, 0, 64, 33), 1, "one"),
    Case(40, 2048, (70, 5), 2),
    Case(3, 33, (1, 2, 3, 4, 5, 6, 7, 8), 8),
    Case(64, 96, (100,), 1),
    Case(5, 1, (1, 1), 1, "any"),
    Case(131, 130, (3, 259), 2),
    Case(150, 197, (300, 0, 131, 1), 2, "any"),
)


class Variant(NamedTuple):
    """An activation, and which projections have biases."""

    activation: Activation = SILU
    biases: tuple[str, ...] = ()

    def __str__(self) -> str:
        limit = "" if self.activation.limit == SILU.limit else f"-{self.activation.limit}"
        return "-".join((self.activation.name + limit, *self.biases))

    def arguments(self, inputs: "Inputs") -> dict[str, Any]:
        """What a kernel takes besides the inputs: random biases between NaN in memory; nothing where nothing is new."""
        if self == PLAIN:
            return {}
        shapes = {"gate_up": (2, len(inputs.down)), "down": (len(inputs.offsets) - 1, inputs.x.shape[1])}
        biases = {name: guarded(torch.randn(shapes[name]).to(inputs.x.device)) for name in self.biases}
        return {"activation": self.activation, "biases": Biases(**biases) if biases else None}


PLAIN = Variant()
BOTH = ("gate_up", "down")
GENERAL = (
    Variant(SILU, BOTH),
    Variant(SILU, ("gate_up",)),
    Variant(SILU, ("down",)),
    *(Variant(Activation(name), biases) for name in ("gelu", "gelu_tanh", "swigluoai") for biases in ((), BOTH)),
    Variant(Activation("swigluoai", alpha=0.8, limit=0.7), BOTH),  # limits that many numbers are beyond
)


class Inputs(NamedTuple):
    x: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    offsets: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    max_width: int


def random_inputs(case: Case, dtype: torch.dtype, seed: int, device: str) -> Inputs:
    """Fresh inputs, each with NaN or, around the offsets, absurd numbers next to it in memory: a read outside shows."""
    torch.manual_seed(seed)
    rows, num_experts = sum(case.widths), len(case.widths)
    odd = seed % 2  # what half of the runs have: x not contiguous, 64-bit integers, a wider max_width than needed
    x = guarded(torch.randn(case.tokens, case.hidden + 3 * odd).to(device, dtype))
    x[:, case.hidden :] = torch.nan
    integers = torch.int64 if odd else torch.int32
    return Inputs(
        x=x[:, : case.hidden],
        gate_up=guarded((torch.randn(2, rows, case.hidden) / case.hidden**0.5).to(device, dtype)),
        down=guarded(torch.randn(rows, case.hidden).to(device, dtype)),
        offsets=guarded(torch.tensor([0, *case.widths]).cumsum(0).to(device, integers)),
        topk_weights=guarded(torch.rand(case.tokens, case.topk).to(device)),
        topk_ids=_route(case, num_experts).to(device, integers),
        max_width=max(case.widths) + 5 * odd,
    )


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """A copy between NaN or large integers in memory."""
    around = torch.nan if tensor.is_floating_point() else min(2**30, torch.iinfo(tensor.dtype).max)
    memory = torch.full((tensor.numel() + 4096,), around, dtype=tensor.dtype, device=tensor.device)
    inside = memory[2048 : 2048 + tensor.numel()].view(tensor.shape)
    return inside.copy_(tensor)


def _route(case: Case, num_experts: int) -> torch.Tensor:
    shape = (case.tokens, case.topk)
    if case.routing == "router":
        return torch.rand(case.tokens, num_experts).topk(case.topk).indices
    if case.routing == "any":
        ids = torch.randint(-2, num_experts + 2, shape)
        return torch.where(ids > num_experts, 1000, ids)
    return torch.full(shape, 1 if case.routing == "one" else -1)


def few_numbers(rows: int, columns: int, most: int) -> torch.Tensor:
    """-1, 0 and 1: in each row at most `most` that are not 0."""
    numbers = torch.zeros(rows, columns)
    return numbers.scatter_(1, torch.randint(columns, (rows, most)), torch.randint(-1, 2, (rows, most)).float())


def activated(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """By the definitions."""
    if activation.name == "swigluoai":
        gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
        return gate * torch.sigmoid(activation.alpha * gate) * (up + 1)
    functions = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}
    return functions[activation.name](gate) * up


def reference(
    inputs: Inputs, activation: Activation = SILU, biases: Biases | None = None, *, fp8_hidden: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The exact result and the error that rounding may cause, both float64 [tokens, hidden].

    Rounded to the dtype are what enters the down projection, what leaves it, and the sum: three times at most `eps` of
    the sum of absolute terms (hardware rounds to nearest, which is half of it; the interpreter truncates bfloat16). The
    rest is float32 arithmetic on sums of absolute terms: a small multiple of its eps, far below the worst case. No
    activation is steeper than 1.2.

    With `fp8_hidden` what enters the down projection is rounded to float8_e4m3fn, scaled so that a token's largest is
    448: by at most 1/16 of it or, where it is small, 2^-10 of a scale.
    """
    x, gate_up, down, offsets, topk_weights, topk_ids, _ = inputs
    x64, gate64, up64, down64 = x.double(), gate_up[0].double(), gate_up[1].double(), down.double()
    result, rounded, computed, coarse = (torch.zeros_like(x64) for _ in range(4))
    bounds, biases = offsets.tolist(), biases or Biases()
    gate_up_bias = x64.new_zeros(2, len(down)) if biases.gate_up is None else biases.gate_up.double()
    down_bias = x64.new_zeros(len(bounds) - 1, x.shape[1]) if biases.down is None else biases.down.double()
    for expert, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        weight = (topk_weights.double() * (topk_ids == expert)).sum(1, keepdim=True)
        gate, up, (gate_bias, up_bias) = gate64[begin:end], up64[begin:end], gate_up_bias[:, begin:end]
        product = activated(x64 @ gate.T + gate_bias, x64 @ up.T + up_bias, activation)
        absolute = x64.abs() @ gate.abs().T + gate_bias.abs()
        absolute *= x64.abs() @ up.abs().T + up_bias.abs() + (activation.name == "swigluoai")
        result += weight * (product @ down64[begin:end] + down_bias[expert])
        rounded += weight * (product.abs() @ down64[begin:end].abs() + down_bias[expert].abs())
        computed += weight * (absolute @ down64[begin:end].abs() + down_bias[expert].abs())
        if fp8_hidden and begin < end:
            error = torch.maximum(product.abs() / 16, product.abs().amax(1, keepdim=True) / 448 / 1024)
            coarse += weight * (error @ down64[begin:end].abs())
    smallest = torch.finfo(x.dtype).smallest_normal
    allowed = 3 * torch.finfo(x.dtype).eps * (rounded + smallest) + 16 * torch.finfo(torch.float32).eps * computed
    return result, allowed + coarse


@contextlib.contextmanager
def poisoned_memory():
    """torch.empty returns NaN and the largest integers, so that whatever is read but never written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        if not torch.empty(1).isnan():
            raise RuntimeError("torch.utils.deterministic.fill_uninitialized_memory is off")
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def check(
    ragged_moe: Callable, case: Case, dtype: torch.dtype, seed: int, device: str, variant: Variant = PLAIN
) -> str:
    """Calls a kernel on random inputs; "" or what is wrong with its output."""
    inputs = random_inputs(case, dtype, seed, device)
    arguments = variant.arguments(inputs)
    expected, allowed = reference(inputs, **arguments)
    with poisoned_memory():
        actual = ragged_moe(*inputs, **arguments)
    return compare(actual, expected, allowed, dtype)


def check_triton(case: Case, dtype: torch.dtype, seed: int, device: str, variant: Variant = PLAIN) -> str:
    """The same for the Triton kernel."""
    from pruned_vllm.kernels.ragged_moe_triton import ragged_moe

    return check(ragged_moe, case, dtype, seed, device, variant)


def compare_contestants() -> list[str]:
    """Runs bench.ragged_moe's contestants, which compares their outputs; returns their names."""
    from bench.experts import timing as moe_timing
    from bench.experts.layers import Layer
    from bench.ragged_moe import measure

    moe_timing.SHORT_CASE_SECONDS = 0
    (record,) = measure([Layer("tiny", 64, 2, 96, (64, 7, 0, 33, 20, 1, 40, 30))], [1, 5], repeats=1, device="cpu")
    return list(record["cases"][1]["contestants"])


def compare(actual: torch.Tensor, expected: torch.Tensor, allowed: torch.Tensor, dtype: torch.dtype) -> str:
    """ "" or a sentence with the largest error."""
    if actual.dtype != dtype or actual.shape != expected.shape:
        return f"output is {actual.dtype} {list(actual.shape)}"
    excess = (actual.double() - expected).abs() - allowed
    wrong = ~(excess <= 0)  # NaN is wrong
    if not wrong.any():
        return ""
    first = tuple(wrong.nonzero()[0].tolist())
    return (
        f"{int(wrong.sum())} of {wrong.numel()} numbers are wrong, the first at {first}: "
        f"{actual[first].item()}, not {expected[first].item()} within {allowed[first].item()}"
    )


def schedule(topk_ids: list[list[int]], offsets: list[int], block_m: int) -> tuple[list[list[int]], list[int]]:
    """The list of tiles and the sorted pairs that the kernel makes."""
    from pruned_vllm.kernels.ragged_moe_schedule import make_schedule

    with poisoned_memory():
        _, tiles, sorted_pairs = make_schedule(torch.tensor(topk_ids), torch.tensor(offsets), block_m)
    return tiles.tolist(), sorted_pairs.tolist()


class Types(NamedTuple):
    """What kernels are compiled for, in Triton's names of types: "bf16", "fp8e4nv", "i8", "u8" ...

    Attributes:
        x: the input and output.
        weights: codes where they are not like x.
        inputs: what is multiplied, where it is not like x.
        group_size: 0: a scale for each row.
        ids: of the experts that tokens choose, and where experts begin.
    """

    x: str
    weights: str | None = None
    inputs: str | None = None
    group_size: int = 0
    ids: str = "i32"


def compile_config(config: Config, types: Types, compute_capability: int, variant: Variant = PLAIN) -> list:
    """The gate-and-up and the down kernel compiled for a GPU that need not be there, and what quantizes their inputs.
    Sizes are multiples of 16."""
    from pruned_vllm.kernels.ragged_moe_codes import QUANTIZE_BLOCK, _quantize_kernel
    from pruned_vllm.kernels.ragged_moe_triton import VECTOR, _down_kernel, _gate_up_kernel

    inputs, weights = types.inputs or types.x, types.weights or types.x
    pointers = {"gate_up": weights, "down": weights, "partial": types.x, "topk_weights": "fp32"}
    pointers |= dict.fromkeys(("tiles", "sorted_pairs"), "i32") | dict.fromkeys(("topk_ids", "offsets"), types.ids)
    pointers |= {"scales": "fp32", "run_offsets": "i32"} if types.weights else {}
    absent = dict.fromkeys(() if types.inputs else ("x_scales", "intermediate_scales"))
    absent |= dict.fromkeys(() if types.weights else ("scales", "run_offsets"))
    options = {"SORTED": config.is_sorted, "GROUP": config.group, "BLOCK_M": config.block_m, "VECTOR": VECTOR}
    options |= {"GROUP_SIZE": types.group_size} | absent
    activation = variant.activation
    options |= {"ACTIVATION": activation.name, "ALPHA": activation.alpha, "LIMIT": activation.limit}
    options |= {} if "gate_up" in variant.biases else {"bias": None}
    gate_up = {"x": inputs, "x_scales": "fp32", "bias": "fp32", "intermediate": types.x}
    down = {"intermediate": inputs, "intermediate_scales": "fp32"}
    compiled = [
        _compile(kernel, pointers | more, options | tile.launch_options(types.group_size), compute_capability)
        for kernel, tile, more in ((_gate_up_kernel, config.gate_up, gate_up), (_down_kernel, config.down, down))
    ]
    if types.inputs:
        pointers |= {"values": types.x, "codes": types.inputs, "scales": "fp32"}
        options = {"ROUTED": True, "BLOCK": QUANTIZE_BLOCK, "VECTOR": VECTOR, "num_warps": 4, "num_stages": 3}
        compiled.append(_compile(_quantize_kernel, pointers, options, compute_capability))
    return compiled


def compile_reduce(dtype: str, compute_capability: int, has_bias: bool):
    """The kernel that sums a token's choices, of which there are 4."""
    from pruned_vllm.kernels.ragged_moe_reduce import REDUCE_BLOCK, _reduce_kernel

    pointers = {"partial": dtype, "out": dtype, "topk_ids": "i32", "offsets": "i32"}
    options = {"TOPK": 4, "BLOCK": REDUCE_BLOCK, "num_warps": 4, "num_stages": 3}
    if has_bias:
        pointers |= {"topk_weights": "fp32", "down_bias": "fp32"}
    else:
        options |= {"topk_weights": None, "down_bias": None}
    return _compile(_reduce_kernel, pointers, options, compute_capability)


def _compile(kernel, pointers: dict[str, str], options: dict, compute_capability: int):
    """A kernel compiled for arguments that are aligned. Of pointers and options it takes those that it has."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    launch = {name: options[name] for name in ("num_warps", "num_stages")}
    constants = {name: value for name, value in options.items() if name in kernel.arg_names}
    kinds = {name: f"*{kind}" for name, kind in pointers.items()} | dict.fromkeys(constants, "constexpr")
    signature = {name: kinds.get(name, "i32") for name in kernel.arg_names}
    multiples = ("hidden", "row_size", "up_offset", "intermediate_stride", "columns", "stride")
    aligned = [name for name, kind in signature.items() if kind.startswith("*") or name in multiples]
    source = ASTSource(
        kernel,
        signature,
        {(kernel.arg_names.index(name),): value for name, value in constants.items()},
        {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", compute_capability, 32), options=launch)
