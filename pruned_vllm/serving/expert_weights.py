"""The weights of a rank's routed experts as the kernel takes them, made from a checkpoint's tensors one by one.

Rows lie one expert after the other: gate and up [2, rows, hidden], down [rows, hidden] (transposed). Experts that are
quantized have scales beside them, and some families have biases, see `Scales` and `Biases` in
kernels/ragged_moe_arguments.py. Nothing but one tensor of the file and what becomes of it is in memory besides, also
where 16-bit weights are quantized on the way in.

The outputs of all ranks are summed, so the first rank alone adds the biases of down. It does so for every expert,
whichever channels it holds.
"""

from dataclasses import dataclass
from itertools import accumulate, count

import torch
from torch import nn

from pruned_vllm.common.errors import InputError
from pruned_vllm.kernels.huge_pages import prefer_huge_pages
from pruned_vllm.serving.expert_scheme import ExpertScheme
from pruned_vllm.serving.layout_changes import DOWN, GATE, UP

DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": torch.uint8}
_LARGEST = {"int8": 127.0, "fp8": torch.finfo(torch.float8_e4m3fn).max}
# As in vLLM (quantization/online/fp8.py), so that channels of zeros have a scale to be divided by.
_SMALLEST_SCALE = 1 / (_LARGEST["fp8"] * 512)


@dataclass(frozen=True)
class Place:
    """Where an expert's part of a tensor goes.

    Attributes:
        expert: its number.
        channels: those of its channels that this rank holds.
        rows: where they lie among the rank's rows.
        runs: where the scales of down_proj lie; empty where there are none.
    """

    expert: int
    channels: range
    rows: slice
    runs: slice


def place_experts(channels: list[range], scheme: ExpertScheme | None) -> list[Place]:
    """The places of all experts, of which the rank holds `channels`."""
    rows = [0, *accumulate(map(len, channels))]
    runs = [0, *accumulate(_runs(held, scheme) for held in channels)]
    places = zip(count(), channels, rows, rows[1:], runs, runs[1:], strict=False)
    return [
        Place(expert, held, slice(start, end), slice(first, last)) for expert, held, start, end, first, last in places
    ]


def make_parameters(places: list[Place], hidden_size: int, scheme: ExpertScheme | None) -> dict[str, nn.Parameter]:
    """Uninitialised parameters by name, on the device and in the dtype that are the default. Where the rank holds no
    channel there are none."""
    rows, runs = places[-1].rows.stop, places[-1].runs.stop
    if not rows:  # nothing would be loaded, and vLLM wants every parameter loaded
        return {}
    if scheme is None:
        tensors = {"gate_up": torch.empty(2, rows, hidden_size), "down": torch.empty(rows, hidden_size)}
    else:
        stored, dtype = hidden_size // (2 if scheme.number == "int4" else 1), DTYPES[scheme.number]
        groups = 1 if scheme.group_size is None else hidden_size // scheme.group_size
        tensors = {
            "gate_up": torch.empty(2, rows, stored, dtype=dtype),
            "down": torch.empty(rows, stored, dtype=dtype),
            "gate_up_scale": torch.empty(2, rows, groups, dtype=torch.float32),
            "down_scale": torch.empty(runs, hidden_size, dtype=torch.float32),
        }
    for tensor in tensors.values():
        prefer_huge_pages(tensor)
    return {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()}


def make_biases(places: list[Place], hidden_size: int, rank: int) -> dict[str, nn.Parameter]:
    """The same for the biases of a family that has some."""
    rows, tensors = places[-1].rows.stop, {}
    if rows:
        tensors["gate_up_bias"] = torch.empty(2, rows, dtype=torch.float32)
    if rank == 0:
        tensors["down_bias"] = torch.empty(len(places), hidden_size, dtype=torch.float32)
    return {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()}


def parameter_name(projection: str, part: str, has_biases: bool) -> str | None:
    """Which parameter a tensor of the checkpoint goes to; None for what nobody needs.

    Args:
        part: the last part of its name.
        has_biases: whether the family's experts have biases.

    Raises:
        InputError: experts have no such tensors.
    """
    weight = "down" if projection == DOWN else "gate_up"
    if part in ("weight", "weight_packed"):
        return weight
    if part == "weight_scale":
        return f"{weight}_scale"
    if part == "bias" and has_biases:
        return f"{weight}_bias"
    if part == "weight_shape":
        return None
    raise InputError(f"experts of different widths have no tensors {part!r}")


def target_of(name: str, parameter: torch.Tensor, place: Place, projection: str) -> torch.Tensor:
    """The part of a parameter that belongs to one projection of an expert."""
    if name == "down":
        return parameter.data[place.rows]
    if name == "down_scale":
        return parameter.data[place.runs]
    if name == "down_bias":
        return parameter.data[place.expert]
    return parameter.data[(GATE, UP).index(projection), place.rows]


def quantized(weight: torch.Tensor, scheme: ExpertScheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds a weight [outputs, inputs] to the nearest numbers; returns them and their scales [outputs, 1]."""
    weight = weight.float()
    scale = (weight.abs().amax(1, keepdim=True) / _LARGEST[scheme.number]).clamp_min(_SMALLEST_SCALE)
    numbers = (weight / scale).clamp(-_LARGEST[scheme.number], _LARGEST[scheme.number])
    return (numbers.round() if scheme.number == "int8" else numbers).to(DTYPES[scheme.number]), scale


def rank_weight(
    tensor: torch.Tensor, place: Place, projection: str, num_bits: int | None, hidden_size: int
) -> torch.Tensor:
    """A weight of the checkpoint, quantized or plain, as the rank's rows of the parameter have it.

    Args:
        num_bits: of a weight in a tensor that holds several in each number; None for other tensors.
    """
    channels = slice(place.channels.start, place.channels.stop)
    if num_bits is None:
        return tensor[:, channels].T if projection == DOWN else tensor[channels]
    numbers = _unpacked(tensor, num_bits)  # from 0 on
    rows = numbers[:, channels].T if projection == DOWN else numbers[channels, :hidden_size]
    if num_bits == 4:
        return rows[:, 0::2] | rows[:, 1::2] << 4
    return rows.contiguous().view(torch.int8) ^ -128  # less 128


def rank_scale(
    tensor: torch.Tensor, place: Place, projection: str, group_size: int | None, outputs: int
) -> torch.Tensor:
    """A scale of the checkpoint as the rank's part of the parameter has it.

    Args:
        outputs: of the projection, on all ranks.
    """
    scale = tensor.float()
    if scale.numel() == 1:  # one for the whole tensor
        scale = scale.reshape(1, 1).expand(outputs, 1)
    channels = place.channels
    if projection != DOWN:
        return scale[channels.start : channels.stop]
    if group_size is None:
        return scale.T
    return scale[:, channels.start // group_size : -(-channels.stop // group_size)].T


def _runs(channels: range, scheme: ExpertScheme | None) -> int:
    if scheme is None or not channels:
        return 0
    return 1 if scheme.group_size is None else -(-len(channels) // scheme.group_size)


def _unpacked(tensor: torch.Tensor, num_bits: int) -> torch.Tensor:
    """int32 [rows, columns / (32 / bits)] -> uint8 [rows, columns], what is stored in each place."""
    stored = tensor.contiguous().view(torch.uint8)  # the first weight is in the lowest bits of the first byte
    if num_bits == 8:
        return stored
    return torch.stack((stored & 15, stored >> 4), dim=-1).flatten(1)
