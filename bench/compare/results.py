"""compare.json, compare.md and the picture of `make compare`."""

from collections.abc import Mapping
from pathlib import Path

from bench.compare.plan import Variant
from bench.real.records import LIBRARIES, Records
from bench.real.results import renamed
from bench.tables.compare import decode_seconds, front, summary, title
from pruned_vllm.common.environment import cpu_features, cpu_name, library_versions

RESULTS_FILE = "compare.json"
SIZES = ("parameters", "bytes")


def collect(records: Records, models: Mapping[str, Variant], work: Path, command: str, device: str) -> dict:
    """What compare.json holds of the steps that are done; `work` is where the run lies."""
    results = {name: dict(record["result"]) for name, record in records.done.items()}
    dense = {key: results["model"][key] for key in SIZES} | results["know-dense"]
    found = {"dense": dense} | {name: _of_variant(results, variant) for name, variant in models.items()}
    measured = {
        "command": command,
        "versions": library_versions(LIBRARIES),
        "hardware": {"cpu": cpu_name(), "cpu_features": cpu_features()} | gpu(device),
        "model": results["model"],
        "models": found,
        "steps": {
            name: {key: record[key] for key in ("seconds", "machine", "settings") if key in record}
            for name, record in records.done.items()
        },
    }
    return renamed(measured, {results["model"]["directory"]: "dense", str(work.resolve()): "compare"})


def gpu(device: str) -> dict:
    import torch

    if device == "cpu":
        return {}
    return {"gpu": torch.cuda.get_device_name(), "tf32": torch.backends.cuda.matmul.allow_tf32}


def _of_variant(results: Mapping, variant: Variant) -> dict:
    name, made = variant.name, dict(results[f"{variant.command}-{variant.name}"])
    sizes = made if variant.command == "recover" else results[f"convert-{name}"]
    about = {"command": made.pop("command"), "data": variant.data, "from": variant.source}
    about |= {key: sizes[key] for key in SIZES} | results[f"know-{name}"]
    about["seconds"] = made.get("learning_seconds", made.get("training_seconds"))
    if f"speed-{name}" in results:
        about["speed"] = results[f"speed-{name}"]["cases"]
    return about


def write(results: Mapping, directory: Path) -> None:
    """Writes compare.md and compare.png."""
    (directory / "compare.md").write_text(summary(results) + "\n", encoding="utf-8")
    draw(results, directory / "compare.png")


def draw(results: Mapping, path: Path) -> None:
    """Perplexity against the measured time of a decoding step, one panel for each case, with the Pareto front.

    Names stand beside the panel, one below the other in the order of perplexities, as points may be close together.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = results["models"]
    timed = [name for name in models if "speed" in models[name]]
    cases = [case["name"] for case in models[timed[0]]["speed"]] if timed else []
    size = (7.5 * max(1, len(cases)), max(4.0, 0.19 * len(timed) + 1.5))
    figure, panels = pyplot.subplots(1, max(1, len(cases)), figsize=size, squeeze=False, layout="constrained")
    for panel, case in zip(panels[0], cases, strict=False):
        places = {name: (1000 * seconds, models[name]["perplexity"]) for name, seconds in decode_seconds(models, case)}
        best = front(places)
        panel.plot(*zip(*(places[name] for name in best), strict=True), color="tab:orange", zorder=1)
        for name, (time, perplexity) in places.items():
            panel.scatter(time, perplexity, color="black" if name == "dense" else "tab:blue", zorder=2, s=18)
        panel.set_yscale("log")
        panel.margins(0.06)
        panel.autoscale_view()  # now, because heights depend on it
        heights = {
            name: panel.transAxes.inverted().transform(panel.transData.transform(place))[1]
            for name, place in places.items()
        }
        for name, height in apart(heights, 1 / (len(places) + 1)).items():
            panel.annotate(
                title(name),
                places[name],
                xytext=(1.06, height),
                textcoords="axes fraction",
                fontsize=8,
                va="center",
                color="tab:orange" if name in best else "black",
                arrowprops={"arrowstyle": "-", "color": "lightgrey", "linewidth": 0.6, "relpos": (0, 0.5)},
            )
        panel.set_title(f"{case}: lower and further left is better", fontsize=10)
        panel.set_xlabel("measured time of a decoding step, ms")
        panel.set_ylabel("perplexity on held-out text")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def apart(heights: Mapping[str, float], gap: float) -> dict[str, float]:
    """Heights from 0 to 1 in the same order, at least `gap` from each other: as near to `heights` as pushing from below
    and then from above gets. `gap` is at most 1 / (number - 1)."""
    found, least = {}, 0.0
    for name in sorted(heights, key=lambda name: heights[name]):
        found[name] = least = max(least, heights[name])
        least += gap
    most = 1.0
    for name in reversed(found):
        found[name] = min(most, found[name])
        most = found[name] - gap
    return found
