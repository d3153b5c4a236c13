"""Measures groups of cells, and keeps a JSON file of each cell so that a sweep can go on where it stopped."""

import hashlib
import json
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from bench.speed.engines import through_plugin
from bench.speed.results import case_record, describe_hardware, describe_model, describe_versions
from bench.speed.setting import Setting, time_models
from bench.sweep.cells import UNPRUNED, Cell
from bench.sweep.plan import kv_cache_bytes
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import read_json, write_json
from pruned_vllm.formats.geometry import ModelGeometry


def cell_path(output_dir: Path, cell: Cell) -> Path:
    return output_dir / "cells" / f"{cell.name}.json"


def finished_cells(cells: Sequence[Cell], setting: Setting, output_dir: Path) -> dict[str, dict]:
    """Records of the cells that were measured before, by name.

    Raises:
        InputError: a file holds what was measured with other sizes or settings, on another machine, or with other
            versions of the libraries; cells are set beside each other, so all must have the same.
    """
    found: dict[str, dict] = {}
    problems = []
    written = [(cell, path) for cell in cells if (path := cell_path(output_dir, cell)).exists()]
    where = {"versions": describe_versions(), "hardware": describe_hardware()} if written else {}
    for cell, path in written:
        record = read_json(path)
        now = {**plan_of(cell, setting), **where}
        then = {**record.get("plan", {}), **{key: record.get(key) for key in where}}
        if others := [key for key in now if then.get(key) != now[key]]:
            advice = "remove it, or use another --output-dir"
            problems.append(f"{path} was measured with other {', '.join(others)}: {advice}")
        else:
            found[cell.name] = record
    if problems:
        raise InputError("This sweep does not continue what is in --output-dir:", problems)
    return found


def plan_of(cell: Cell, setting: Setting) -> dict:
    """All that decides what a cell measures: settings, and a digest of both models' config.json."""
    configs = json.dumps([cell.config, cell.pruned_config], sort_keys=True)
    return {
        "cases": [case.name for case in setting.cases],
        "repeats": setting.repeats,
        "rounds": setting.rounds,
        "compile": setting.compile,
        "configs": hashlib.sha256(configs.encode()).hexdigest()[:16],
    }


def measure_group(group: Sequence[Cell], setting: Setting, output_dir: Path) -> dict[str, dict]:
    """Runs a dense engine and one for each cell in turns; writes the cells' files and returns their records by name."""
    dense, started = group[0].dense, datetime.now(UTC).isoformat(timespec="seconds")
    with tempfile.TemporaryDirectory() as directory:
        models = write_models(group, setting, Path(directory))
        samples, dtype, machine = time_models(setting, dense, models)
    common = {**setting.describe(dtype), "machine": machine, "date": started}
    records = {}
    for number, cell in enumerate(group, 1):
        geometries = {"dense": dense, "pruned": cell.pruned}
        cases = [
            case_record(
                case,
                {"dense": samples[case][0], "pruned": samples[case][number]},
                geometries,
                dtype.itemsize,
                machine,
                setting.rounds,
            )
            for case in setting.cases
        ]
        described = {
            side: describe_model(Path(f"{cell.name} ({side}, random weights)"), geometry, dtype.itemsize)
            for side, geometry in geometries.items()
        }
        records[cell.name] = {
            "cell": {**cell.describe(), "measured_with": [other.name for other in group]},
            "cases": cases,
            "models": described,
            **common,
            "plan": plan_of(cell, setting),
        }
    for cell in group:
        path = cell_path(output_dir, cell)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, records[cell.name])
    return records


def write_models(group: Sequence[Cell], setting: Setting, directory: Path) -> list[dict]:
    """Writes config.json of the dense model and of each cell's; returns what `vllm.LLM` needs to know of each."""
    models = []
    configs: list[tuple[str, dict, ModelGeometry, dict]] = [("dense", group[0].config, group[0].dense, {})]
    for cell in group:
        how = through_plugin(cell.dense) if cell.pattern == UNPRUNED else {}
        configs.append((cell.name, cell.pruned_config, cell.pruned, how))
    for name, config, geometry, how in configs:
        (directory / name).mkdir()
        write_json(directory / name / "config.json", config)
        memory = kv_cache_bytes(geometry, setting.cases)
        models.append({"model": str(directory / name), "kv_cache_memory_bytes": memory, **how})
    return models
