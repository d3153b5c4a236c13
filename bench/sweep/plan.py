"""Which cells are measured side by side, what memory that takes, and how long it lasts.

Engines that live side by side take turns, so that their times can be compared pair by pair, and one dense engine serves
for all pruned ones beside it. A group is as many cells of one model as the memory holds.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from bench.speed.engines import SETTLE_SECONDS
from bench.speed.memory import GIB, KV_BLOCK_TOKENS
from bench.speed.setting import Setting
from bench.sweep.cells import Cell
from pruned_vllm.common.environment import cpu_features
from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.ideal import Case, step_bytes, step_flops

ELEMENT_BYTES = 2  # bfloat16
ENGINE_BYTES = 1.25 * GIB  # of an engine, whatever its model: two processes with their libraries, compiled code
USABLE = 0.8  # of the machine's memory, which should be quiet; the same at every start, so that sweeps go on
SMALLEST_DEPTH = 4  # layers; with fewer, lm_head would take most of the time


class Machine(NamedTuple):
    """What plans assume of a machine.

    Attributes:
        memory_bytes: that engines may take together.
        gb_per_s, tflop_per_s: that a step reaches. Rough; they serve to say how long a sweep takes.
        start_seconds: of an engine that compiles, and of one that does not.
    """

    memory_bytes: float
    gb_per_s: float
    tflop_per_s: float
    start_seconds: tuple[float, float]


def this_machine() -> Machine:
    import psutil
    import torch

    if torch.cuda.is_available():
        return Machine(USABLE * torch.cuda.mem_get_info()[1], 2000, 300, (60, 30))
    rates = (20, 0.15) if "AVX-512" in cpu_features() else (8, 0.05)
    return Machine(USABLE * psutil.virtual_memory().total, *rates, (80, 30))


def kv_cache_bytes(geometry: ModelGeometry, cases: Sequence[Case]) -> int:
    """KV cache that the case which needs most needs, in whole blocks, and two blocks for vLLM itself."""
    blocks = max(case.batch_size * -(-(case.input_len + case.output_len) // KV_BLOCK_TOKENS) for case in cases) + 2
    return blocks * KV_BLOCK_TOKENS * geometry.kv_cache_bytes_per_token(ELEMENT_BYTES)


def engine_bytes(geometry: ModelGeometry, cases: Sequence[Case]) -> float:
    return geometry.num_parameters * ELEMENT_BYTES + kv_cache_bytes(geometry, cases) + ENGINE_BYTES


def groups(cells: Sequence[Cell], cases: Sequence[Case], memory_bytes: float) -> list[list[Cell]]:
    """Cells by the engines that run at the same time. Ragged and uniform of one sparsity stay together where they fit.

    Raises:
        InputError: some cells do not fit even alone beside their dense model.
    """
    found: list[list[Cell]] = []
    problems = []
    for _, of_model in groupby(cells, key=lambda cell: cell.model):
        group: list[Cell] = []
        for unit in _units(list(of_model), cases, memory_bytes):
            needed = group_bytes(unit, cases)
            if needed > memory_bytes:
                names = ", ".join(cell.name for cell in unit)
                problems.append(f"{names} and the dense model: {needed / GIB:.1f} GiB")
            elif group and group_bytes(group + unit, cases) <= memory_bytes:
                group += unit
            else:
                group = list(unit)
                found.append(group)
    if problems:
        raise InputError(
            f"These cells need more than {memory_bytes / GIB:.1f} GiB, {USABLE:.0%} of the memory; choose fewer "
            "--num-hidden-layers:",
            problems,
        )
    return found


def _units(cells: Sequence[Cell], cases: Sequence[Case], memory_bytes: float) -> Iterator[list[Cell]]:
    for _, same in groupby(cells, key=lambda cell: cell.sparsity):
        unit = list(same)
        if group_bytes(unit, cases) <= memory_bytes:
            yield unit
        else:
            yield from ([cell] for cell in unit)


def group_bytes(group: Sequence[Cell], cases: Sequence[Case]) -> float:
    """Memory of the dense engine and of those of the group."""
    return sum(engine_bytes(geometry, cases) for geometry in (group[0].dense, *(cell.pruned for cell in group)))


def depth_that_fits(
    cells_at: Callable[[int], list[Cell]], full: int, cases: Sequence[Case], memory_bytes: float
) -> int:
    """Layers to keep of a model: all of them if pairs of engines fit, else so many that all cells fit side by side, or
    pairs, where that would leave fewer than SMALLEST_DEPTH. At least 1.

    Args:
        cells_at: the cells of the model with so many layers.
    """

    def together(depth: int) -> bool:
        return group_bytes(cells_at(depth), cases) <= memory_bytes

    def in_pairs(depth: int) -> bool:
        return all(group_bytes([cell], cases) <= memory_bytes for cell in cells_at(depth))

    if in_pairs(full):
        return full
    return (
        max(_deepest(together, full), SMALLEST_DEPTH) if together(SMALLEST_DEPTH) else max(1, _deepest(in_pairs, full))
    )


def _deepest(fits: Callable[[int], bool], full: int) -> int:
    """The largest depth below `full` that fits; 0 where none does. What fits does so with fewer layers, too."""
    low, high = 0, full
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def seconds(group: Sequence[Cell], setting: Setting, machine: Machine) -> float:
    """About how long a group takes."""
    geometries = [group[0].dense, *(cell.pruned for cell in group)]
    run = sum(_case_seconds(geometry, case, machine) for geometry in geometries for case in setting.cases)
    starts = len(geometries) * machine.start_seconds[not setting.compile]
    return setting.rounds * (starts + run * (setting.repeats + 1))


def _case_seconds(geometry: ModelGeometry, case: Case, machine: Machine) -> float:
    reading = step_bytes(geometry, case, ELEMENT_BYTES) / machine.gb_per_s / 1e9
    computing = step_flops(geometry, case) / machine.tflop_per_s / 1e12
    prefill = step_flops(geometry, Case("prefill", case.batch_size, case.input_len, 1)) / machine.tflop_per_s / 1e12
    before = prefill if case.kind == "decode" else 0.0  # a decode case has a prompt as well, which is not timed
    return SETTLE_SECONDS + before + case.num_steps * max(reading, computing)
