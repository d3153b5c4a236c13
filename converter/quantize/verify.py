"""Compares quantized weights, as they were written, with the weights that they were made of.

A weight may be off by half a step of what it was rounded to. The steps are computed here from the weights themselves,
and not from the scales that were written: a scale of the wrong axis, or of another group, is noticed. Rounding predicts
a relative error, too: numbers that fall anywhere between two steps are off by a step / sqrt(12), root mean square.
Weights of which many are smaller than a step are off by less.
"""

import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from converter.folded import FoldedTensors
from converter.plan import Plan
from converter.quantize.library import Rounding
from converter.quantize.schemes import Scheme
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.progress import progress_bar
from pruned_vllm.formats.headers import read_headers
from pruned_vllm.formats.weights import open_safetensors

# Of e4m3: the largest number, bits of the mantissa, and the exponent below which steps do not shrink.
FLOAT_LARGEST, MANTISSA_BITS, SMALLEST_EXPONENT = 448, 3, -6
SLACK = 2.0**-8  # of a number, relative: rounding of a scale to bfloat16, and what follows from it
SHOWN = 10  # tensors in a message


@dataclass
class Errors:
    """Sums over the weights of one kind of layer: squares of weights, of their errors and of the errors predicted."""

    squares: float = 0.0
    found: float = 0.0
    predicted: float = 0.0

    def add(self, weight: torch.Tensor, written: torch.Tensor, step: torch.Tensor) -> int:
        """Counts some weights, and returns how many are off by more than half a step."""
        error = (written - weight).abs()
        # The largest weight of a group may lie beyond the last value, by what rounding its scale did.
        allowed = step / 2 * (1 + SLACK) + weight.abs() * SLACK
        self.squares += float(weight.double().square().sum())
        self.found += float(error.double().square().sum())
        self.predicted += float(step.double().square().sum()) / 12
        return int((~(error <= allowed)).sum())  # NaN is wrong

    def describe(self, kind: str) -> str:
        found, predicted = (math.sqrt(part / max(self.squares, 1e-300)) for part in (self.found, self.predicted))
        return f"{kind}: relative rms error {found:.2e}, rounding predicts {predicted:.2e}"


def check_rounding(plan: Plan, directory: Path) -> list[str]:
    """Compares the weights in `directory` with those of the plan; returns a sentence about each kind of layer.

    Raises:
        InputError: weights are off by more than rounding can do; the tensors are named.
    """
    quantization = plan.quantization
    if quantization is None:
        raise ValueError("there is no rounding to be checked: this plan rounds nothing")
    scheme, rounding = quantization.scheme, Rounding(quantization.scheme, quantization.group_size)
    suffixes = ("_packed", "_scale") if scheme.is_packed else ("", "_scale")
    folded, stored, shapes = FoldedTensors(plan), read_headers(directory), plan.pruned.tensor_shapes()
    kinds: dict[str, Errors] = {}
    problems: list[str] = []
    with ExitStack() as stack:
        files = {tensor.file for tensor in stored.values()}
        opened = {file: stack.enter_context(open_safetensors(file, "pt")) for file in files}
        names = [name for name in shapes if quantization.quantizes(name)]
        for name in progress_bar(names, desc="verifying", unit=" weights"):
            errors, wrong = kinds.setdefault(_kind(name), Errors()), 0
            parts = {suffix: opened[stored[name + suffix].file].get_slice(name + suffix) for suffix in suffixes}
            for block, rows in folded.rows(name):
                weight, steps = rows.float(), steps_of(rows.float(), scheme, quantization.group_size)
                written = {suffix: part[block.start : block.stop] for suffix, part in parts.items()}
                wrong += errors.add(weight, rounding.widen(written, weight.shape[1]), steps)
            if wrong:
                count = math.prod(shapes[name])
                problems.append(f"{name}: {wrong:,} of {count:,} weights are off by more than half a step")
    if problems:
        more = [f"and {len(problems) - SHOWN} more tensors"] if len(problems) > SHOWN else []
        raise InputError(
            "What was written is not the model rounded to the nearest value. Weights of float16 that are very small "
            "may be the reason (convert them to bfloat16 first); else it is a fault of quantize-pruned, please report "
            "it:",
            [*problems[:SHOWN], *more],
        )
    return [errors.describe(kind) for kind, errors in sorted(kinds.items())]


def steps_of(weight: torch.Tensor, scheme: Scheme, group_size: int | None) -> torch.Tensor:
    """The distance of neighbouring values at each float32 weight [rows, columns]; 0 at 0, which every scale has.

    The largest weight of an output, or of its group, is the largest value of the scheme.
    """
    columns = group_size or weight.shape[1]
    largest = FLOAT_LARGEST if scheme.kind == "float" else (2**scheme.num_bits - 1) / 2
    scales = weight.abs().unflatten(1, (-1, columns)).amax(-1) / largest
    steps = scales.repeat_interleave(columns, dim=1)
    if scheme.kind == "float":
        # A number just below a power of two may be rounded with the steps above it.
        _, exponent = torch.frexp(weight.abs() / steps * (1 + SLACK))  # of a number in [0.5, 1)
        steps = torch.ldexp(steps, (exponent - 1).clamp(min=SMALLEST_EXPONENT) - MANTISSA_BITS)
    return torch.where(weight == 0, 0, steps)


def _kind(name: str) -> str:
    """q_proj of "model.layers.0.self_attn.q_proj.weight"; routed experts' projections apart from others."""
    *_, projection, _ = name.split(".")
    return f"experts' {projection}" if ".experts." in name else projection
