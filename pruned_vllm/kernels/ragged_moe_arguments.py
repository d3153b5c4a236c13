"""What a ragged mixture-of-experts kernel accepts."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal, get_args

import torch

NUMBERS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int64)
FP8_CAPABILITY = (8, 9)  # compute capability that Triton needs to widen float8_e4m3fn
CODES = (torch.int8, torch.float8_e4m3fn, torch.uint8)  # of quantized weights
ActivationName = Literal["silu", "gelu", "gelu_tanh", "swigluoai"]


@dataclass(frozen=True)
class Activation:
    """What a channel makes of its gate and its up.

    Attributes:
        name: vLLM's names. "silu": silu(gate) * up. "gelu": gelu(gate) * up, by the error function. "gelu_tanh": the
            same by its approximation with tanh, which Transformers calls gelu_pytorch_tanh. "swigluoai": that of
            gpt-oss, (up + 1) * gate * sigmoid(alpha * gate), with gate at most `limit` and up from -limit to limit.
        alpha, limit: of "swigluoai".
    """

    name: ActivationName = "silu"
    alpha: float = 1.702
    limit: float = 7.0

    def __post_init__(self) -> None:
        if self.name not in get_args(ActivationName):
            raise ValueError(f"activation is {self.name!r}, not one of {', '.join(get_args(ActivationName))}")


SILU = Activation()


@dataclass(frozen=True, eq=False)
class Scales:
    """What the codes of quantized experts are multiplied by.

    Codes are int8 or float8_e4m3fn, shaped like the weights, or uint8 with two columns in a byte: gate_up
    [2, rows, hidden / 2], down [rows, hidden / 2], the even column in the low half, each a number from -8 to 7 plus 8.

    Attributes:
        gate_up: float32 [2, rows, hidden / group_size], [2, rows, 1] without a group size: row r of gate or up is
            scale[r, g] * codes in its columns g * group_size to (g + 1) * group_size.
        down: float32 [runs, hidden]. A run is group_size consecutive channels of an expert, the last run of an expert
            what is left; without a group size all channels of an expert. Channel c's row is scale[run of c] * codes.
        down_offsets: int32 [experts + 1]: where each expert's runs begin in `down`. Without channels it has none.
        group_size: columns of gate and up, and channels of down, that share a scale; it divides hidden. None: all.
        quantize_input: whether large batches may round what enters the products to float8_e4m3fn, with a scale for
            each token, as schemes with dynamic activations do. GPUs do so for float8_e4m3fn weights, CPUs do not.
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    down_offsets: torch.Tensor
    group_size: int | None = None
    quantize_input: bool = False


@dataclass(frozen=True, eq=False)
class Biases:
    """What is added to the projections of experts; None adds nothing.

    Attributes:
        gate_up: float32 [2, rows]: of gate and of up, one for each row of their weights, added before the activation.
        down: float32 [experts, hidden]: added once to what a token gets from an expert, before the router's weight
            multiplies it; also by experts without channels. Where several ranks hold parts of every expert and their
            outputs are summed, one of them alone may have it.
    """

    gate_up: torch.Tensor | None = None
    down: torch.Tensor | None = None


def check_arguments(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    offsets: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    max_width: int,
    scales: Scales | None = None,
    biases: Biases | None = None,
) -> None:
    """Refuses what kernels would read wrongly; looks at shapes, dtypes and places only, never at values.

    Values in a GPU's memory would have to be waited for; `check_offsets` is for values in CPU memory.

    Raises:
        ValueError: lists everything that does not fit.
    """
    expected_biases = {} if biases is None else _expected_biases(biases, x, down, offsets)
    biases_fit = not expected_biases or all(_is_bias(tensor, shape, x) for tensor, shape in expected_biases.values())
    if biases_fit and _fit(x, gate_up, down, offsets, topk_weights, topk_ids, max_width, scales):
        return
    given = {
        "gate_up": gate_up, "down": down, "offsets": offsets, "topk_weights": topk_weights, "topk_ids": topk_ids
    }  # fmt: skip
    if scales is not None:
        given |= {
            "scales.gate_up": scales.gate_up, "scales.down": scales.down, "scales.down_offsets": scales.down_offsets
        }  # fmt: skip
    given |= {name: tensor for name, (tensor, _) in expected_biases.items()}
    problems = [f"{name} is on {t.device}, x on {x.device}" for name, t in given.items() if t.device != x.device]
    if x.dtype not in NUMBERS:
        problems.append(f"x is {x.dtype}; float32, bfloat16 or float16 are supported")
    if x.dim() != 2:
        problems.append(f"x has shape {list(x.shape)}, not [tokens, hidden]")
    problems += _weight_problems(x, gate_up, down, scales)
    problems += [
        f"{name} is not contiguous (copying weights at every call would cost more than the product)"
        for name, tensor in given.items()
        if not name.startswith("topk") and not tensor.is_contiguous()
    ]
    if offsets.dim() != 1 or len(offsets) == 0 or offsets.dtype not in INTEGERS:
        problems.append(f"offsets is {offsets.dtype} {list(offsets.shape)}, not int32 or int64 [experts + 1]")
    if topk_ids.dim() != 2 or topk_ids.shape[:1] != x.shape[:1] or topk_ids.dtype not in INTEGERS:
        problems.append(f"topk_ids is {topk_ids.dtype} {list(topk_ids.shape)}, not int32 or int64 [{len(x)}, topk]")
    if topk_weights.shape != topk_ids.shape or not topk_weights.is_floating_point():
        problems.append(f"topk_weights is {topk_weights.dtype} {list(topk_weights.shape)}, not floats like topk_ids")
    if max_width < 0:
        problems.append(f"max_width is {max_width}")
    if scales is not None and x.dim() == 2 and down.dim() == 2:
        problems += _scale_problems(scales, down, offsets, hidden=x.shape[1])
    problems += [
        f"{name} is {tensor.dtype} {list(tensor.shape)}, not torch.float32 {list(shape)}"
        for name, (tensor, shape) in expected_biases.items()
        if tensor.dtype != torch.float32 or tensor.shape != shape
    ]
    raise ValueError("\n  - ".join(("ragged_moe cannot use its arguments", *problems)))


def _fit(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    offsets: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    max_width: int,
    scales: Scales | None,
) -> bool:
    """Whether there is nothing to refuse, in few steps. Since the weights of a layer push what Python needs out of the
    caches, listing problems took a tenth of the time of a quantized layer for one token."""
    if x.dtype not in NUMBERS or x.dim() != 2 or down.dim() != 2 or offsets.dim() != 1:
        return False
    (tokens, hidden), (rows, stored), device = x.shape, down.shape, x.device
    tensors, codes, bounds = [gate_up, down, offsets], down.dtype, len(offsets)
    if scales is None:
        weights_fit = codes == x.dtype and stored == hidden
    else:
        size = hidden if scales.group_size is None else scales.group_size
        per_element = 2 if codes == torch.uint8 else 1
        tensors += (scales.gate_up, scales.down, scales.down_offsets)
        weights_fit = (
            codes in CODES
            and stored * per_element == hidden
            and size > 0
            and hidden % size == size % per_element == 0
            and scales.gate_up.dtype == scales.down.dtype == torch.float32
            and scales.gate_up.shape == (2, rows, hidden // size)
            and scales.down.dim() == 2
            and scales.down.shape[1] == hidden
            and scales.down_offsets.dtype == torch.int32
            and scales.down_offsets.shape == (bounds,)
        )
    return (
        weights_fit
        and gate_up.dtype == codes
        and gate_up.shape == (2, rows, stored)
        and all(tensor.is_contiguous() and tensor.device == device for tensor in tensors)
        and bounds > 0
        and offsets.dtype in INTEGERS
        and topk_ids.dtype in INTEGERS
        and topk_ids.dim() == 2
        and len(topk_ids) == tokens
        and topk_weights.shape == topk_ids.shape
        and topk_weights.is_floating_point()
        and topk_weights.device == topk_ids.device == device
        and max_width >= 0
    )


def _expected_biases(
    biases: Biases, x: torch.Tensor, down: torch.Tensor, offsets: torch.Tensor
) -> dict[str, tuple[torch.Tensor, tuple[int, ...]]]:
    """The biases that are there, and the shapes that they must have; what these follow from may be wrong, too."""
    experts = tuple(bounds - 1 for bounds in offsets.shape)
    shapes = {
        "biases.gate_up": (biases.gate_up, (2, *down.shape[:1])),
        "biases.down": (biases.down, (*experts, *x.shape[-1:])),
    }
    return {name: (tensor, shape) for name, (tensor, shape) in shapes.items() if tensor is not None}


def _is_bias(tensor: torch.Tensor, shape: tuple[int, ...], x: torch.Tensor) -> bool:
    return (
        tensor.dtype == torch.float32 and tensor.shape == shape and tensor.is_contiguous() and tensor.device == x.device
    )


def _weight_problems(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, scales: Scales | None) -> list[str]:
    """What is wrong with the shapes and dtypes of gate_up and down."""
    hidden, columns = x.shape[-1], "hidden"
    problems = []
    if scales is None:
        weights = (("gate_up", gate_up), ("down", down))
        problems += [f"{name} is {tensor.dtype}, x {x.dtype}" for name, tensor in weights if tensor.dtype != x.dtype]
    elif down.dtype not in CODES or gate_up.dtype != down.dtype:
        problems.append(
            f"gate_up is {gate_up.dtype} and down {down.dtype}; with scales both must be int8, float8_e4m3fn, or uint8 "
            "with 4 bits a column"
        )
    stored = hidden
    if scales is not None and torch.uint8 in (gate_up.dtype, down.dtype):
        stored, columns = hidden // 2, "hidden / 2"
        if hidden % 2:
            problems.append(f"hidden is {hidden}; with 4 bits a column it must be even")
    if down.dim() != 2 or down.shape[1] != stored or gate_up.shape != (2, *down.shape):
        problems.append(
            f"gate_up has shape {list(gate_up.shape)} and down {list(down.shape)}; "
            f"they must be [2, rows, {columns}] and [rows, {columns}] with hidden = {hidden}"
        )
    return problems


def _scale_problems(scales: Scales, down: torch.Tensor, offsets: torch.Tensor, hidden: int) -> list[str]:
    """What is wrong with scales for these weights, whose shapes may be wrong, too."""
    problems = []
    expected = {
        "scales.down": (scales.down, torch.float32, (*scales.down.shape[:1], hidden)),
        "scales.down_offsets": (scales.down_offsets, torch.int32, tuple(offsets.shape)),
    }
    size = hidden if scales.group_size is None else scales.group_size
    if size < 1 or hidden % size:
        problems.append(f"group_size is {size}, which does not divide hidden = {hidden}")
    elif down.dtype == torch.uint8 and size % 2:
        problems.append(f"group_size is {size}; with 4 bits a column it must be even")
    else:
        expected["scales.gate_up"] = (scales.gate_up, torch.float32, (2, len(down), hidden // size))
    problems += [
        f"{name} is {tensor.dtype} {list(tensor.shape)}, not {dtype} {list(shape)}"
        for name, (tensor, dtype, shape) in expected.items()
        if tensor.dtype != dtype or tensor.shape != shape
    ]
    return problems


def check_offsets(offsets: list[int], rows: int) -> None:
    """Refuses offsets that would make a kernel read outside of the weights.

    Args:
        offsets: where each expert's rows begin, and where the last one's end [experts + 1].
        rows: how many rows of weights there are.

    Raises:
        ValueError: names the first expert whose rows are not there.
    """
    if offsets[0] >= 0 and offsets[-1] <= rows and offsets == sorted(offsets):
        return
    for expert, (begin, end) in enumerate(pairwise(offsets)):
        if not 0 <= begin <= end <= rows:
            raise ValueError(f"offsets send expert {expert} to rows {begin} to {end} of {rows} rows of weights")


def run_offsets(offsets: Sequence[int], group_size: int | None) -> list[int]:
    """`Scales.down_offsets` for experts whose rows begin at `offsets`, where the scales of no expert lie unused."""
    most = group_size or max(1, offsets[-1])  # rows in a run
    return [*accumulate(((end - begin + most - 1) // most for begin, end in pairwise(offsets)), initial=0)]


def check_down_offsets(scales: Scales, offsets: list[int]) -> None:
    """Refuses run offsets that do not fit the experts' rows, or lead outside of the scales.

    Args:
        offsets: those of the experts' rows, which `check_offsets` has accepted [experts + 1].

    Raises:
        ValueError: names the first expert whose scales are not there.
    """
    given, expected, runs = scales.down_offsets.tolist(), run_offsets(offsets, scales.group_size), len(scales.down)
    if given == expected and given[-1] <= runs:
        return
    for expert, (begin, end) in enumerate(pairwise(given)):
        wanted = expected[expert + 1] - expected[expert]
        if not (begin >= 0 and end - begin == wanted and end <= runs):
            raise ValueError(
                f"down_offsets give expert {expert}, which has {offsets[expert + 1] - offsets[expert]} channels, "
                f"the runs {begin} to {end} of {runs}; with group_size {scales.group_size} it must have {wanted}"
            )
