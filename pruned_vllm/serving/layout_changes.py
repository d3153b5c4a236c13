"""How the tensors of a checkpoint change on their way into layers that tensor parallelism has laid out anew.

First as movements of whole units, heads and channels, along the outputs or the inputs of a linear layer; then as
changes of the tensors that store the layer: its weight, its bias, and where it is quantized its scales and packed
weights. Padding is zeros: weights that are 0, or whose scale is 0.
"""

import math
from collections.abc import Iterator

import torch

from pruned_vllm.common.errors import InputError
from pruned_vllm.common.padding import PAD, head_rows
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.layer import LayerGeometry
from pruned_vllm.formats.quantization import PACKED_BITS, Scheme, WeightScheme
from pruned_vllm.formats.quantized_tensors import linear_scheme
from pruned_vllm.serving.model_layout import ModelLayout
from pruned_vllm.serving.sharding import LayerLayout

# The dimension, the index of what it holds afterwards (PAD: padding), and what padding is filled with. On the CPU,
# where files are read, whatever device vLLM is building the model under.
Change = tuple[int, torch.Tensor, int]
# A linear layer, whether its outputs (0) or inputs (1) move, and the index of what they are afterwards.
Movement = tuple[str, int, torch.Tensor]

OUTPUTS, INPUTS = 0, 1
GATE, UP, DOWN = "w1", "w3", "w2"  # an expert's projections, as its module calls them


def layout_changes(layout: ModelLayout) -> dict[str, Change]:
    """The change of every tensor that stock layers would not shard as its layer's layout says, by full name.

    Raises:
        InputError: quantized weights share scales or stored numbers among units that would be parted.
    """
    geometry, quantization = layout.geometry, layout.quantization
    changes: dict[str, Change] = {}
    problems: list[str] = []
    known: dict[tuple, list[Movement]] = {}  # equal layers move alike: one index in memory
    for number, layer in enumerate(geometry.layers):
        key = (layer, layout.layers[number])
        if key not in known:
            known[key] = list(_layer_movements(geometry, layer, layout.layers[number]))
        for name, dim, index in known[key]:
            module = f"model.layers.{number}.{name}"
            scheme = None if quantization is None else linear_scheme(geometry, quantization, module)
            try:
                for part, change in _part_changes(dim, index, scheme, may_end_inside=".self_attn." not in module):
                    changes[f"{module}.{part}"] = change
            except ValueError as error:
                problems.append(f"{module}: {error}")
        problems += _parted_inputs(layout, number)
    if problems:
        raise InputError(
            f"--tensor-parallel-size {layout.ranks} would part what this quantized checkpoint stores together; use "
            "--tensor-parallel-size 1, or quantize the pruned model with a scale for each output, or with a group size "
            f"that divides head_dim {geometry.head_dim}:",
            problems,
        )
    return changes


def _parted_inputs(layout: ModelLayout, number: int) -> Iterator[str]:
    """What keeps the ranks from sharing the inputs of o_proj, also where they stay in their order."""
    if layout.quantization is None or layout.ranks == 1 or not layout.layers[number].query_heads:
        return
    module = f"model.layers.{number}.self_attn.o_proj"
    scheme = linear_scheme(layout.geometry, layout.quantization, module)
    if isinstance(scheme, WeightScheme):
        block = scheme.block_size or (1, 1)
        unit = math.lcm(1 if scheme.layout == "awq" else scheme.pack_factor, scheme.group_size or 1, block[INPUTS])
        inputs = layout.layers[number].query_heads * layout.geometry.head_dim
        if inputs % unit:
            yield f"{module}: each rank would hold {inputs} inputs, but {unit} are stored together"


def _layer_movements(geometry: ModelGeometry, layer: LayerGeometry, layout: LayerLayout) -> Iterator[Movement]:
    head_dim = geometry.head_dim
    if layout.query_index != list(range(layer.num_attention_heads)):
        yield "self_attn.q_proj", OUTPUTS, head_rows(layout.query_index, geometry.family.query_rows(head_dim))
        yield "self_attn.o_proj", INPUTS, head_rows(layout.query_index, head_dim)
    if layout.kv_replicas == 1 and layout.kv_index != list(range(layer.num_key_value_heads)):
        kv_rows = head_rows(layout.kv_index, head_dim)
        yield "self_attn.k_proj", OUTPUTS, kv_rows
        yield "self_attn.v_proj", OUTPUTS, kv_rows
    if layout.channel_index != list(range(layer.intermediate_size)):
        yield from _mlp_movements(geometry.family.mlp_of(layer), torch.tensor(layout.channel_index, device="cpu"))


def _mlp_movements(module: str, channels: torch.Tensor) -> Iterator[Movement]:
    yield f"{module}.gate_proj", OUTPUTS, channels
    yield f"{module}.up_proj", OUTPUTS, channels
    yield f"{module}.down_proj", INPUTS, channels


def _part_changes(
    dim: int, index: torch.Tensor, scheme: Scheme | None, may_end_inside: bool
) -> Iterator[tuple[str, Change]]:
    """The changes of a linear layer's tensors, by the last parts of their names. Raises ValueError with numbers.

    Args:
        may_end_inside: whether the inputs that are padding are zeros anyway, so that what is stored behind the last
            weight of a packed number does not count.
    """
    if scheme is not None and (not isinstance(scheme, WeightScheme) or scheme.layout in ("gptq", "awq")):
        raise ValueError(f"{scheme} cannot be padded, only weights of compressed-tensors and fp8 can")
    if dim == OUTPUTS:
        yield "bias", (dim, index, 0)
    if scheme is None:
        yield "weight", (dim, index, 0)
        return
    if dim == INPUTS and not scheme.symmetric and scheme.strategy == "channel" and (index == PAD).any():
        raise ValueError("inputs that are padding would need the zero point of each output as their weight")
    for part, unit, fill in _stored_units(scheme, dim):
        yield part, (dim, _in_units(index, unit, part, may_end_inside), fill)


def _stored_units(scheme: WeightScheme, dim: int) -> Iterator[tuple[str, int, int]]:
    """For each tensor with this dimension: how many outputs or inputs one of its elements is for, and the padding."""
    block_size = scheme.block_size or (1, 1)
    if scheme.layout == "packed":
        zeros = sum(1 << (bit + scheme.num_bits - 1) for bit in range(0, PACKED_BITS, scheme.num_bits))
        # Behind outputs that are padding there are scales of 0. Stored is weight + 2^(bits - 1), as an int32.
        yield "weight_packed", *((1, 0) if dim == OUTPUTS else (scheme.pack_factor, zeros - (1 << PACKED_BITS)))
    else:
        yield "weight", 1, 0
    scale_units = {
        "tensor": None,
        "channel": 1 if dim == OUTPUTS else None,
        "group": 1 if dim == OUTPUTS else scheme.group_size,
        "block": block_size[dim],
    }
    if (unit := scale_units[scheme.strategy]) is not None:
        yield scheme.scale_name, unit, 0
        if not scheme.symmetric:
            is_packed = scheme.layout == "packed" and dim == OUTPUTS
            yield "weight_zero_point", scheme.pack_factor if is_packed else unit, 0


def _in_units(index: torch.Tensor, unit: int, part: str, may_end_inside: bool) -> torch.Tensor:
    """An index of outputs or inputs as one of what holds `unit` of them each. Raises ValueError where one is parted."""
    if unit == 1:
        return index
    total = int(index.max()) + 1
    if len(index) % unit == 0 and (may_end_inside or total % unit == 0):
        runs = index.view(-1, unit)
        first = runs[:, :1]
        whole = first + torch.arange(unit, device="cpu")
        whole = torch.where((first == PAD) | (whole >= total), PAD, whole)
        if ((first == PAD) | (first % unit == 0)).all() and (runs == whole).all():
            return torch.where(first == PAD, PAD, first // unit).view(-1)
    raise ValueError(f"{part} has an element for {unit} of {total} units each, and a rank would begin inside of one")


def module_names(geometry: ModelGeometry) -> dict[str, str]:
    """Where the tensors of a module go that has another name in the checkpoint: routers and routed experts.

    An expert's projections become w1 (gate), w3 (up) and w2 (down) in every family, as Mixtral has them: vLLM's mapping
    of stacked weights takes every gate_proj for a part of a gate_up_proj.
    """
    names: dict[str, str] = {}
    for number, layer in enumerate(geometry.layers):
        prefix = f"model.layers.{number}"
        for expert in range(len(layer.expert_intermediate_sizes)):
            modules = geometry.family.experts_format.modules_of(expert)
            for module, projection in zip(modules, (GATE, UP, DOWN), strict=True):
                names[f"{prefix}.{module}"] = f"{prefix}.mlp.experts.{expert}.{projection}"
        if layer.expert_intermediate_sizes:
            names[f"{prefix}.{geometry.family.experts_format.router}"] = f"{prefix}.mlp.gate"
    return names
