"""sweep.json: the figures of all cells that were measured, beside the ideal, each other and the paper's. Pure Python.

    {"cells": [{"name", "model", "pattern": "ragged", "uniform" or "unpruned", "sparsity": percent,
                "num_hidden_layers", "full_num_hidden_layers", "measured_with": [names of cells], "parameters",
                "dense_parameters",
                "cases": [{"name", "speedup", "speedup_low", "speedup_high", "speedup_confidence", "ideal_speedup",
                           "of_ideal", "warnings",
                           "full_depth_ideal_speedup": of the model with all its layers,
                           "of_uniform": {"speedup", "speedup_low", "speedup_high", ...}: of ragged cells}],
                "paper": {"source", "where", "device", "speedup"} or null}],
     "models": {model: {"dense" or the name of a cell: parameters}},
     "settings", "versions", "hardware", "machine", "date", "command"}

`of_uniform` is how fast a ragged cell is against the uniform one beside it, times what their sizes differ by: 1 where
both are as near to their ideal. It is there where both ran side by side, pair by pair.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from bench.speed.statistics import speedup_statistics
from bench.sweep.cells import Cell
from bench.sweep.patterns import ragged_layers
from bench.sweep.plan import ELEMENT_BYTES
from bench.sweep.shapes import PAPER, PRINTED
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.ideal import Case, ideal_speedup

COPIED = ("speedup", "speedup_low", "speedup_high", "speedup_confidence", "ideal_speedup", "of_ideal", "warnings")


def summary(cells: Sequence[Cell], records: Mapping[str, Mapping[str, Any]], align: int, paper: bool) -> dict:
    """What sweep.json holds, less the command."""
    found = []
    for cell in cells:
        record = records[cell.name]
        uniform = _beside(record, records)
        cases = []
        for index, case in enumerate(record["cases"]):
            measured = {"name": case["name"], **{key: case[key] for key in COPIED}}
            measured["full_depth_ideal_speedup"] = full_depth_ideal(cell, Case.parse(case["name"]), align)
            if uniform is not None:
                measured["of_uniform"] = of_uniform(case, uniform["cases"][index], record["settings"]["rounds"])
            cases.append(measured)
        dense, pruned = (record["models"][side]["parameters"] for side in ("dense", "pruned"))
        sizes = {"parameters": pruned, "dense_parameters": dense}
        found.append({**record["cell"], **sizes, "cases": cases, "paper": printed(cell) if paper else None})
    last = records[found[-1]["name"]]
    models: dict[str, dict[str, int]] = {}
    for figures in found:
        of_model = models.setdefault(figures["model"], {"dense": figures["dense_parameters"]})
        of_model[figures["name"]] = figures["parameters"]
    return {
        "cells": found,
        "models": models,
        **{key: last[key] for key in ("settings", "versions", "hardware", "machine", "date")},
    }


def _beside(record: Mapping[str, Any], records: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The uniform cell of a ragged one, if they ran side by side."""
    cell = record["cell"]
    other = records.get(cell["name"].replace("_ragged_", "_uniform_"))
    if cell["pattern"] != "ragged" or other is None:
        return None
    together = (other["cell"]["measured_with"], other["date"]) == (cell["measured_with"], record["date"])
    return other if together else None


def of_uniform(ragged: Mapping[str, Any], uniform: Mapping[str, Any], rounds: int) -> dict:
    """Speed of the ragged cell over that of the uniform one, as if they were of one size; pair by pair."""
    sizes = uniform["ideal_speedup"] / ragged["ideal_speedup"]
    as_large = [seconds * sizes for seconds in uniform["pruned"]["samples_s"]]
    return speedup_statistics(as_large, ragged["pruned"]["samples_s"], rounds)


def full_depth_ideal(cell: Cell, case: Case, align: int) -> float | None:
    """The ideal speedup of the model with all its layers, ragged like the cell; None where none were cut."""
    if cell.full_depth == len(cell.pruned.layers):
        return None
    dense = ModelGeometry.from_config(cell.config | {"num_hidden_layers": cell.full_depth})
    return ideal_speedup(dense, ragged_layers(dense, 1 - cell.sparsity / 100, align), case, ELEMENT_BYTES)


def printed(cell: Cell) -> dict | None:
    """What the paper has for this cell; None where it prints nothing."""
    found = PRINTED.get(cell.model)
    if found is None or cell.sparsity not in found.speedups:
        return None
    return {"source": PAPER, "where": found.where, "device": found.device, "speedup": found.speedups[cell.sparsity]}
