"""Heads, channels and hidden dimensions that are exactly zero in a model of dense shape: FLAP --unstr, merged masks.

Reads a model directory with safetensors whose tensors have the shapes that config.json says. What is zero throughout
and adds nothing is cut; biases stay. Where zeros are scattered, as after unstructured or 2:4 pruning, nothing can be
cut, and the command says so. It reads all weights twice.
"""

from pathlib import Path

from converter.beside import companions_of, require_directory
from converter.checkpoint import Checkpoint
from converter.from_shapes import shapes_differ
from converter.hidden import make_hidden_cut
from converter.source import HiddenMask, Request, Source
from converter.zero_units import ZeroUnits, find_zero_units
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import read_json
from pruned_vllm.formats.config import dense_geometry
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.headers import dense_problems

NAME = "zero rows and columns"

# Projects whose merged models look like stock ones but were trained with another divisor in their norms (NutePrune,
# Compresso): a key of config.json that only they write.
OTHER_NORMS_KEY = "lora_param"
SCATTERED = 0.01  # share of zeros above which a model was pruned, but not by whole rows and columns


def recognise(path: Path) -> str | None:
    if shapes_differ(path) is not False or OTHER_NORMS_KEY in read_json(path / "config.json"):
        return None
    return "a model whose tensors have the shapes that config.json says"


def read(request: Request) -> Source:
    directory = require_directory(request.path)
    weights = Checkpoint.from_directory(directory)
    dense = dense_geometry(directory, weights.config)
    if problems := dense_problems(weights.tensors, dense):
        raise InputError(
            f"The tensors in {directory} are not those that its config.json describes (--from shapes reads models "
            "whose tensors are cut already):",
            problems,
        )
    units = find_zero_units(weights, dense)
    notes = list(units.notes)
    hidden = _hidden_mask(units, weights, dense, notes)
    if hidden is None and not units.has_masks:
        notes.append(_nothing_found(units.share))
    companions = companions_of(request, directory)
    return Source(
        weights=weights,
        method="zeros",
        dense=dense,
        layers=dense.layers,
        masks=units.masks,
        hidden=hidden,
        inputs=(directory, companions),
        companions=companions,
        notes=tuple(notes),
    )


def _hidden_mask(units: ZeroUnits, weights: Checkpoint, dense: ModelGeometry, notes: list[str]) -> HiddenMask | None:
    """The mask of hidden dimensions; None, and a sentence why, where they cannot be cut from this family."""
    if units.hidden is None:
        return None
    mask = HiddenMask(embedding=units.hidden, outputs=units.hidden)
    try:
        make_hidden_cut(mask, dense, weights.config, alignment=1)
    except InputError as error:
        count = int((units.hidden == 0).sum())
        notes.append(f"{count:,} hidden dimensions are zero throughout, but stay: {error}.")
        return None
    return mask


def _nothing_found(share: float) -> str:
    scattered = "No head, channel or hidden dimension is zero throughout"
    if share > SCATTERED:
        scattered += (
            f", though {share:.1%} of the weights in layers are: zeros that are scattered (unstructured, 2:4 pruning) "
            "make no tensor smaller"
        )
    return f"{scattered}."
