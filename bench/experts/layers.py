"""The layers of routed experts that bench/ragged_moe.py times: published shapes with drawn widths, or a model's own.

Pure Python: OMP_NUM_THREADS, which that script sets, only counts until torch is imported.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.speed.widths import beta_shares, widths_of
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import read_json
from pruned_vllm.formats.geometry import ModelGeometry

ALIGNMENT = 32  # vLLM's CPU op takes hidden sizes and widths in multiples of it
SHAPES = {  # hidden size, experts, experts of a token, width
    "qwen3-30b-a3b": (2048, 128, 8, 768),
    "deepseek-moe-16b": (2048, 64, 6, 1408),
}


class Layer(NamedTuple):
    """Sizes of one layer's routed experts.

    Attributes:
        top_k: experts of a token.
        full_width: channels of each expert before pruning.
        widths: channels of each expert after it.
    """

    name: str
    hidden_size: int
    top_k: int
    full_width: int
    widths: tuple[int, ...]

    @property
    def kept(self) -> float:
        return sum(self.widths) / len(self.widths) / self.full_width

    @property
    def widest(self) -> int:
        """The width to pad all experts to."""
        return aligned(max(self.widths))


def aligned(size: float) -> int:
    return max(1, -int(-size // ALIGNMENT)) * ALIGNMENT


def drawn_layers(shapes: Sequence[str], keeps: Sequence[float], scale: float) -> Iterator[Layer]:
    """A layer of each shape for each mean share that experts keep; hidden size and width times `scale`, rounded up to
    what vLLM's CPU op takes. Raises InputError."""
    for name in shapes:
        hidden_size, num_experts, top_k, width = SHAPES[name]
        full = aligned(width * scale)
        for keep in keeps:
            widths = widths_of(beta_shares(keep, num_experts), full)
            yield Layer(f"{name}, keep {keep:g}", aligned(hidden_size * scale), top_k, full, widths)


def converted_layers(directory: Path, scale: float) -> Iterator[Layer]:
    """The layers of a converted model in which experts have channels. Raises InputError."""
    geometry = ModelGeometry.from_config(read_json(directory / "config.json"))
    if geometry.experts is None:
        raise InputError(f"--widths-from {directory}: a {geometry.family.model_type} model has no experts")
    for index, (layer, dense) in enumerate(zip(geometry.layers, geometry.dense_layers, strict=True)):
        if any(layer.expert_intermediate_sizes):
            full = aligned(dense.expert_width * scale)
            # Scaled by `scale`, not by full / dense width: rounding that up would make the experts keep more.
            widths = tuple(min(full, round(width * scale)) for width in layer.expert_intermediate_sizes)
            top_k = geometry.experts.num_experts_per_tok
            yield Layer(f"layer {index}", aligned(geometry.hidden_size * scale), top_k, full, widths)
