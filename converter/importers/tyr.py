"""Tyr-the-Pruner: a directory of levels for each matrix, and the list (.txt) that chooses one of them.

Reads the directory with model.layers.{i}.self_attn.o_proj/{level}.pth and the like, or the list in it (name it where
there are several), with --base-model. The chosen matrices take the place of the base model's: what is left of them was
solved for anew. Heads and channels are gone where their columns are exactly zero. EvoPress writes the same layout.
"""

import re
from pathlib import Path

import torch

from converter.base_model import BaseModel, read_base_model
from converter.beside import with_weights_beside
from converter.checkpoint import DTYPES, Checkpoint
from converter.source import Request, Source
from converter.torch_files import read_torch_file
from converter.zero_units import find_zero_units
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import read_lines
from pruned_vllm.formats.headers import dense_problems
from pruned_vllm.formats.tensors import canonical_name

NAME = "Tyr-the-Pruner"

_MODULE = re.compile(r"model\.layers\.\d+\.[\w.]+")
_LINE = re.compile(rf"({_MODULE.pattern})\s*:\s*([+-]?\d{{1,9}})")


def recognise(path: Path) -> str | None:
    if not path.is_dir() and (path.suffix != ".txt" or not _levels(path)):
        return None
    directory = path if path.is_dir() else path.parent
    name = next(iter(sorted(_level_directories(directory))), None)
    return None if name is None else f"levels in {name}/"


def read(request: Request) -> Source:
    file = _find_list(request.path)
    directory, levels = file.parent, _levels(file)
    if not levels:
        raise InputError(f"{file} is no list of levels; its lines must look like model.layers.0.mlp.down_proj: -2")
    base = read_base_model(with_weights_beside(request, directory), "some matrices of layers alone")
    if problems := dense_problems(base.checkpoint.tensors, base.dense):
        raise InputError(f"The dense model in {base.directory} cannot be used:", problems)
    weights, names = _with_levels(base, file, levels)
    units = find_zero_units(weights, base.dense, names)
    return Source(
        weights=weights,
        method="tyr",
        dense=base.dense,
        layers=base.dense.layers,
        masks=units.masks,
        hub_id=base.hub_id,
        inputs=(request.path, directory, base.directory),
        companions=base.directory,
        notes=(*units.notes, *_unlisted(directory, levels, file)),
    )


def _level_directories(directory: Path) -> set[str]:
    return {
        child.name
        for child in directory.iterdir()
        if _MODULE.fullmatch(child.name) and child.is_dir() and any(child.glob("*.pth"))
    }


def _find_list(path: Path) -> Path:
    """The list of levels: INPUT itself, or the only one in the directory."""
    if path.is_file():
        return path
    found = [file for file in sorted(path.glob("*.txt")) if _levels(file)]
    if len(found) != 1:
        what = "several lists of levels" if found else "no list of levels (.txt, as search_sparsity_dist.py writes it)"
        fix = "give the one that is meant in place of the directory" if found else "put it beside the levels"
        raise InputError(f"{path} holds {what}; {fix}", [file.name for file in found])
    return found[0]


def _levels(file: Path) -> dict[str, int]:
    """The level of each module; empty where a line says something else. The last line for a module counts."""
    matches = [_LINE.fullmatch(line) for line in read_lines(file)]
    return {match[1]: int(match[2]) for match in matches if match} if all(matches) else {}


def _with_levels(base: BaseModel, file: Path, levels: dict[str, int]) -> tuple[Checkpoint, list[str]]:
    """The dense model's weights with the chosen matrices, and the names of those. Raises InputError.

    Hundreds of files are mapped here, and open so long; they are not when the weights are read.
    """
    chosen: dict[Path, dict[str, torch.Tensor]] = {}
    names, problems = [], list[str]()
    for module, level in levels.items():
        name, level_file = canonical_name(f"{module}.weight"), file.parent / module / f"{level}.pth"
        if name not in base.checkpoint.tensors:
            problems.append(f"{file.name}: {module}: the dense model has no such matrix")
        elif (tensor := _read_level(level_file, base, name, problems)) is not None:
            chosen[level_file] = {name: tensor}
            names.append(name)
    if problems:
        raise InputError(f"{file} does not fit its levels or the dense model in {base.directory}:", problems)
    return base.checkpoint.replaced(chosen), names


def _read_level(file: Path, base: BaseModel, name: str, problems: list[str]) -> torch.Tensor | None:
    """A matrix of the shape that the dense model's has; None where there is none, and then a problem is added."""
    place = f"{file.parent.name}/{file.name}"
    if not file.is_file():
        problems.append(f"{place}: missing")
        return None
    try:
        tensor = read_torch_file(file)
    except InputError as error:
        problems.append(str(error))
        return None
    shape = base.checkpoint.tensors[name].shape
    if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != shape or tensor.dtype not in DTYPES:
        found = f"{list(tensor.shape)} {tensor.dtype}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        problems.append(f"{place}: {found}; the dense model's {name} has {list(shape)} in a float format")
        return None
    return tensor


def _unlisted(directory: Path, levels: dict[str, int], file: Path) -> tuple[str, ...]:
    left = sorted(_level_directories(directory) - levels.keys())
    if not left:
        return ()
    others = f" and {len(left) - 1} more" if len(left) > 1 else ""
    return (f"{file.name} chooses no level of {left[0]}{others}: the dense model's weights stay there.",)
