"""quantized.json and the picture: what was measured of every pair, form and scheme.

{
  "command",
  "pairs": {name: {
    "models": {"dense", "pruned", "dense-SCHEME", "pruned-SCHEME": {"path", "parameters", "bytes",
      "perplexity", "tokens": as served; or "refused": vLLM's sentence}},
    "schemes": {SCHEME: {"cases": [{"name", "kind", "batch_size", "input_len", "output_len",
      "dense", "pruned", "quantized", "both": {"median_latency_s", "throughput_tokens_per_s", "samples_s",
        "bytes_per_step", and over the dense model "speedup" with its quartiles and interval as in e2e_speedup.json,
        "ideal_speedup", "of_ideal"},
      "of_product": {"ratio", "ratio_q1", "ratio_q3", "ratio_low", "ratio_high"}: the speedup of both over the product
        of the single ones,
      "warnings"}], "machine", "settings", "versions", "hardware"}, or {"refused": {form: sentence}}}
  }}
}
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.quantized.plan import Pair, Settings
from bench.real.records import Records
from pruned_vllm.common.files import write_json

RESULTS_FILE, PICTURE = "quantized.json", "quantized.png"
BARS = {"pruned": "tab:blue", "quantized": "tab:orange", "product": "lightgrey", "both": "tab:green"}


def collect(pairs: Sequence[Pair], settings: Settings, records: Records, command: str) -> dict:
    """All results of the steps that were done."""
    done = {name: record["result"] for name, record in records.done.items()}
    return {
        "command": command,
        "pairs": {
            pair.name: {
                "models": {
                    form: done[f"serve-{pair.name}-{form}"] for form in pair.directories(Path(), settings.schemes)
                },
                "schemes": {scheme: done[f"speed-{pair.name}-{scheme}"] for scheme in settings.schemes},
            }
            for pair in pairs
        },
    }


def write(results: Mapping, directory: Path) -> None:
    """Writes RESULTS_FILE and, where anything was timed, PICTURE."""
    write_json(directory / RESULTS_FILE, results)
    if timed := timed_cases(results):
        draw(timed, directory / PICTURE)


def timed_cases(results: Mapping) -> list[tuple[str, Mapping]]:
    """Every case that was timed, with its title."""
    return [
        (f"{pair}\n{scheme}, batch {case['batch_size']}", case)
        for pair, found in results["pairs"].items()
        for scheme, measured in found["schemes"].items()
        for case in measured.get("cases", ())
    ]


def draw(timed: Sequence[tuple[str, Mapping]], path: Path) -> None:
    """Four bars a case: pruned, quantized, the product of both gains, and both; lines at the ideal speedups."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(max(5.0, 1.5 + 2.0 * len(timed)), 4.4), layout="constrained")
    for number, (_, case) in enumerate(timed):
        speedups = {name: case[name]["speedup"] for name in ("pruned", "quantized", "both")}
        ideals = {name: case[name]["ideal_speedup"] for name in ("pruned", "quantized", "both")}
        speedups["product"] = speedups["pruned"] * speedups["quantized"]
        ideals["product"] = ideals["pruned"] * ideals["quantized"]
        for place, (name, color) in enumerate(BARS.items()):
            x = number + 0.2 * (place - 1.5)
            label = {"product": "pruned x quantized"}.get(name, name) if not number else None
            axes.bar(x, speedups[name], 0.18, color=color, label=label)
            axes.plot([x - 0.09, x + 0.09], [ideals[name]] * 2, color="black", linewidth=1.2)
            axes.text(x, 0.05, f"{speedups[name]:.2f}", ha="center", fontsize=8)
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")  # as fast as the dense model
    axes.set_xticks(range(len(timed)), [title for title, _ in timed])
    axes.set_ylabel("speedup of decoding over the dense model\n(lines: ratio of bytes read)")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.16), ncols=2, frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
