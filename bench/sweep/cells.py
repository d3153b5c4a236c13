"""The cells of a sweep: one pruned model each, against the dense model it comes from. Pure Python."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from bench.sweep.patterns import ragged_layers, uniform_layers
from bench.sweep.shapes import PAPER_SHAPES, PAPER_SPARSITIES
from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.config import converted_config
from pruned_vllm.formats.geometry import ModelGeometry

PATTERNS = ("uniform", "ragged")
UNPRUNED = "unpruned"  # the pattern at sparsity 0: the dense model through the plugin's class


@dataclass(frozen=True)
class Cell:
    """One pruned model.

    Attributes:
        model: what it was before, a key of the shapes.
        pattern: a key of PATTERNS, or UNPRUNED.
        sparsity: percent of heads and channels, or of experts' channels, that are removed on average.
        config: config.json of the dense model.
        pruned: sizes of the pruned one.
        full_depth: layers of the real model, where some were cut.
    """

    model: str
    pattern: str
    sparsity: int
    config: dict[str, Any]
    pruned: ModelGeometry
    full_depth: int

    @property
    def name(self) -> str:
        """Names its file, too."""
        return f"{self.model.lower()}_{self.pattern}_{self.sparsity}"

    @property
    def dense(self) -> ModelGeometry:
        return ModelGeometry.from_config(self.config)

    @property
    def pruned_config(self) -> dict[str, Any]:
        """config.json of the pruned model, as convert-pruned would write it."""
        return converted_config(self.pruned, self.config)

    def describe(self) -> dict:
        return {
            "name": self.name,
            "model": self.model,
            "pattern": self.pattern,
            "sparsity": self.sparsity,
            "num_hidden_layers": len(self.pruned.layers),
            "full_num_hidden_layers": self.full_depth,
        }


def model_cells(
    model: str, config: dict, patterns: Sequence[str], sparsities: Iterable[int], align: int, full_depth: int
) -> list[Cell]:
    """Cells of one model by rising sparsity; sparsity 0 is one cell, whatever the patterns."""
    dense = ModelGeometry.from_config(config)
    cells = []
    for sparsity in sorted(set(sparsities)):
        if not 0 <= sparsity < 100:
            raise InputError(f"sparsity {sparsity} % is not between 0 and 99")
        if not sparsity:
            cells.append(Cell(model, UNPRUNED, 0, config, dense, full_depth))
            continue
        ragged = ragged_layers(dense, 1 - sparsity / 100, align)
        found = {"ragged": ragged, "uniform": uniform_layers(dense, ragged, align)}
        cells += [Cell(model, pattern, sparsity, config, found[pattern], full_depth) for pattern in patterns]
    return cells


def grid_cells(shapes: dict[str, dict], sparsities: Iterable[int], align: int) -> list[Cell]:
    """All cells of the grid."""
    sparsities = list(sparsities)
    return [
        cell
        for model, config in shapes.items()
        for cell in model_cells(model, config, PATTERNS, sparsities, align, config["num_hidden_layers"])
    ]


def paper_cells(model: str, num_hidden_layers: int, align: int) -> list[Cell]:
    """The cells of one of the paper's models, with so many of its layers."""
    config = PAPER_SHAPES[model]
    cut = config | {"num_hidden_layers": num_hidden_layers}
    return model_cells(model, cut, ("ragged",), PAPER_SPARSITIES, align, config["num_hidden_layers"])


def chosen(cells: Sequence[Cell], patterns: Sequence[str]) -> list[Cell]:
    """The cells whose names match one of the patterns, in the shell's language. Raises InputError where none does."""
    unknown = [pattern for pattern in patterns if not any(fnmatchcase(cell.name, pattern) for cell in cells)]
    if unknown:
        names = ", ".join(cell.name for cell in cells)
        raise InputError(f"--only {' '.join(unknown)}: no such cell; there are {names}")
    return [cell for cell in cells if any(fnmatchcase(cell.name, pattern) for pattern in patterns)]
