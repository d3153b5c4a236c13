"""What `make real` found: real.json, its picture and a report of speeds, from the records of all steps.

real.json: {
  "command", "versions", "hardware": where they were collected,
  "model": {"directory", "source", "fingerprint": of its weights, "parameters",
    "kv_cache_bytes_per_token": in bfloat16},
  "text": {"data", "eval_data": sources, empty for Python's own English; "tokens": that perplexity was measured on},
  "models": {"dense", "ddp-20", ... "recovered-50": {
    "method", "sparsity": of pruned ones, "from": of recovered ones,
    "commands": {"learn", "convert"} or {"recover"},
    "learning": what learn-masks or finetune-pruned found, "parameters", "kv_cache_bytes_per_token",
    "perplexity": {"masked": of pruned ones, "converted", "served"}: blocks of 128 tokens, float32,
    "questions": {"right", "questions", "accuracy", "standard_error"}, "chat": [{"prompt", "answer"}]: without a
    chat template, how the model goes on}},
  "speed": {"20", "50": what bench.e2e_speedup found of the best model, with "pruned": its name},
  "steps": {name: {"seconds", "machine": with the load average, "versions", "settings"}}
}
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.real.models import Model
from bench.real.plan import Plan, percent
from bench.real.records import LIBRARIES, Records
from bench.report.reports import results_report
from bench.report.results import Result
from bench.report.write import write as write_report
from bench.tables.real import perplexity_text, title
from pruned_vllm.common.environment import cpu_features, cpu_name, library_versions
from pruned_vllm.common.files import write_json

RESULTS_FILE = "real.json"
PICTURE = "real.png"
SIZES = ("parameters", "kv_cache_bytes_per_token")


def collect(model: Model, plan: Plan, records: Records, work: Path, command: str) -> dict:
    """What RESULTS_FILE holds; `work` is where the run lies."""
    results = {name: record["result"] for name, record in records.done.items()}
    text = records.done["text"]["settings"]
    models = {"dense": {key: results["model"][key] for key in SIZES} | _known(results, "dense")}
    models |= {name: _pruned(results, name) for name in plan.names()}
    models |= {name: _recovered(results, name) for name in plan.recovered_names()}
    found = {
        "command": command,
        "versions": library_versions(LIBRARIES),
        "hardware": {"cpu": cpu_name(), "cpu_features": cpu_features()},
        "model": results["model"],
        "text": {**{key: text[key] for key in ("data", "eval_data")}, "tokens": results["know-dense"]["tokens"]},
        "models": models,
        "speed": {share: results[f"speed-{share}"] for share in map(percent, plan.sparsities)},
        "steps": {
            name: {key: record[key] for key in ("seconds", "machine", "versions", "settings") if key in record}
            for name, record in records.done.items()
        },
    }
    # A reader's paths are others.
    names = {results["model"]["directory"]: model.name, str(work.resolve()): plan.directory, str(work): plan.directory}
    return renamed(found, names)


def renamed(value: Any, names: Mapping[str, str]) -> Any:
    """`value` with every path in its strings replaced by its name."""
    if isinstance(value, Mapping):
        return {key: renamed(inner, names) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [renamed(inner, names) for inner in value]
    if isinstance(value, str):
        for path, name in names.items():
            value = re.sub(rf"{re.escape(path)}(?=[/\s'\"]|$)", name, value)
    return value


def _pruned(results: Mapping, name: str) -> dict:
    method, _, share = name.partition("-")
    learned, converted = (dict(results[f"{step}-{name}"]) for step in ("learn", "convert"))
    commands = {"learn": learned.pop("command"), "convert": converted.pop("command")}
    about = {"method": method, "sparsity": int(share) / 100, "commands": commands, "learning": learned}
    return {**about, **converted, **_known(results, name)}


def _recovered(results: Mapping, name: str) -> dict:
    trained = dict(results[f"recover-{name.partition('-')[2]}"])
    about = {"from": trained.pop("from"), "commands": {"recover": trained.pop("command")}}
    sizes = {key: trained.pop(key) for key in SIZES}
    return {**about, "learning": trained, **sizes, **_known(results, name)}


def _known(results: Mapping, name: str) -> dict:
    known, served = results[f"know-{name}"], results[f"serve-{name}"]
    masked = {"masked": known["masked_perplexity"]} if "masked_perplexity" in known else {}
    return {
        "perplexity": {**masked, "converted": known["perplexity"], "served": served["perplexity"]},
        "questions": {key: known[key] for key in ("right", "questions", "accuracy", "standard_error")},
        "chat": served["chat"],
    }


def write(results: Mapping, directory: Path) -> None:
    """Writes RESULTS_FILE, PICTURE, report.md and report.html."""
    write_json(directory / RESULTS_FILE, results)
    draw(results, directory / PICTURE)
    speeds = [
        Result(title(found["pruned"], results["models"]), "offline", found) for found in results["speed"].values()
    ]
    write_report(results_report(speeds), directory)


def draw(results: Mapping, path: Path) -> None:
    """Perplexity and right answers of all models, as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = results["models"]
    names = list(models)[::-1]  # bars go upwards
    labels = [title(name, models) for name in names]
    colors = [{"dense": "black"}.get(name, "tab:green" if "from" in models[name] else "tab:blue") for name in names]
    size = (10, 0.35 * len(names) + 1.2)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
    perplexities = [models[name]["perplexity"]["served"] for name in names]
    left.barh(labels, perplexities, color=colors)
    left.set_xscale("log")
    left.set_xlabel("perplexity on held-out text (served, blocks of 128 tokens)")
    for place, value in enumerate(perplexities):
        left.text(value, place, f" {perplexity_text(value, 1)}", va="center", fontsize=8)
    left.margins(x=0.25)
    right_shares = [100 * models[name]["questions"]["accuracy"] for name in names]
    errors = [100 * models[name]["questions"]["standard_error"] for name in names]
    right.barh(labels, right_shares, xerr=errors, color=colors, capsize=3)
    right.axvline(25, color="grey", linestyle=":")  # by guessing
    right.set_xlabel(f"right answers of {models['dense']['questions']['questions']}, % (whiskers: standard error)")
    right.set_xlim(0, 100)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
