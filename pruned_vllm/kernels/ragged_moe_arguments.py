"""What a ragged mixture-of-experts kernel accepts."""

from dataclasses import dataclass
from itertools import pairwise

import torch


@dataclass(frozen=True)
class Scales:
    """The scales of quantized experts, whose weights are int8 or float8_e4m3fn, or uint8 with two weights of 4 bits.

    Of the two in a byte the low one is for the even column; a weight is what is stored less 8. An expert computes the
    sum over runs g of its channels of down[g] * (sum over channels c of g of hidden_c * down weight of c).

    Attributes:
        gate_up: float32 [2, rows, hidden / group_size], one column where group_size is None.
        down: float32 [runs, hidden]: down_proj's scale for each output, for each run of `group_size` channels of an
            expert, of which the last may be shorter; one run of all channels where group_size is None.
        down_offsets: int32 [experts + 1]: where each expert's runs begin.
        group_size: inputs that share a scale; None for one scale for each output.
        quantize_input: whether the kernel may quantize its input to float8, a scale for each token; CPUs never do.
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    down_offsets: torch.Tensor
    group_size: int | None
    quantize_input: bool = False


def check_arguments(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    offsets: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    max_width: int,
) -> None:
    """Refuses what kernels would read wrongly; looks at shapes, dtypes and places only, never at values.

    Values in a GPU's memory would have to be waited for; `check_offsets` is for values in CPU memory.

    Raises:
        ValueError: lists everything that does not fit.
    """
    integers = (torch.int32, torch.int64)
    given = {
        "gate_up": gate_up, "down": down, "offsets": offsets, "topk_weights": topk_weights, "topk_ids": topk_ids
    }  # fmt: skip
    problems = [f"{name} is on {t.device}, x on {x.device}" for name, t in given.items() if t.device != x.device]
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        problems.append(f"x is {x.dtype}; float32, bfloat16 or float16 are supported")
    if x.dim() != 2:
        problems.append(f"x has shape {list(x.shape)}, not [tokens, hidden]")
    if down.dim() != 2 or down.shape[1:] != x.shape[1:] or gate_up.shape != (2, *down.shape):
        problems.append(
            f"gate_up has shape {list(gate_up.shape)} and down {list(down.shape)}; "
            f"they must be [2, rows, hidden] and [rows, hidden] with hidden = {x.shape[-1]}"
        )
    problems += [
        f"{name} is {given[name].dtype}, x {x.dtype}" for name in ("gate_up", "down") if given[name].dtype != x.dtype
    ]
    problems += [
        f"{name} is not contiguous (copying weights at every call would cost more than the product)"
        for name in ("gate_up", "down", "offsets")
        if not given[name].is_contiguous()
    ]
    if offsets.dim() != 1 or len(offsets) == 0 or offsets.dtype not in integers:
        problems.append(f"offsets is {offsets.dtype} {list(offsets.shape)}, not int32 or int64 [experts + 1]")
    if topk_ids.dim() != 2 or topk_ids.shape[:1] != x.shape[:1] or topk_ids.dtype not in integers:
        problems.append(f"topk_ids is {topk_ids.dtype} {list(topk_ids.shape)}, not int32 or int64 [{len(x)}, topk]")
    if topk_weights.shape != topk_ids.shape or not topk_weights.is_floating_point():
        problems.append(f"topk_weights is {topk_weights.dtype} {list(topk_weights.shape)}, not floats like topk_ids")
    if max_width < 0:
        problems.append(f"max_width is {max_width}")
    if problems:
        raise ValueError("\n  - ".join(("ragged_moe cannot use its arguments", *problems)))


def check_offsets(offsets: list[int], rows: int) -> None:
    """Refuses offsets that would make a kernel read outside of the weights. Takes some 5 microseconds for 128 experts.

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
