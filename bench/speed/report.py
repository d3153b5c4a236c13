"""Shows e2e results: a table for the terminal and a plot of measured against ideal speedups."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.table import Table


def results_table(cases: Sequence[Mapping]) -> Table:
    table = _table(
        "case", "dense\nms", "pruned\nms", "dense\ntok/s", "pruned\ntok/s", "speedup", "quartiles", "ideal", "of\nideal"
    )
    for case in cases:
        dense, pruned = case["dense"], case["pruned"]
        table.add_row(
            case["name"],
            f"{dense['median_latency_s'] * 1e3:.0f}",
            f"{pruned['median_latency_s'] * 1e3:.0f}",
            f"{dense['throughput_tokens_per_s']:.1f}",
            f"{pruned['throughput_tokens_per_s']:.1f}",
            f"{case['speedup']:.2f}x",
            f"{case['speedup_q1']:.2f}-{case['speedup_q3']:.2f}",
            f"{case['ideal_speedup']:.2f}x",
            f"{case['of_ideal']:.2f}",
        )
    return table


def models_table(models: Mapping[str, Mapping]) -> Table:
    table = _table("model", "parameters", "KV bytes\nper token", "KV tokens\nper GiB")
    for name, model in models.items():
        table.add_row(
            name,
            f"{model['parameters']:,}",
            f"{model['kv_cache_bytes_per_token']:,}",
            f"{model['kv_cache_tokens_per_gib']:,}",
        )
    return table


def _table(name: str, *numbers: str) -> Table:
    table = Table(box=box.SIMPLE, padding=0)
    table.add_column(name, no_wrap=True)
    for header in numbers:
        table.add_column(header, justify="right", no_wrap=True)
    return table


def plot_speedups(cases: Sequence[Mapping], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a PNG: per case a bar for the measured speedup, whiskers at its quartiles, and one for the ideal.

    `metadata` goes into its text chunks.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    speedups, ideals = ([case[key] for case in cases] for key in ("speedup", "ideal_speedup"))
    below = [case["speedup"] - case["speedup_q1"] for case in cases]
    above = [case["speedup_q3"] - case["speedup"] for case in cases]
    positions = range(len(cases))
    figure, axes = pyplot.subplots(figsize=(2.2 + 1.5 * len(cases), 4.2), layout="constrained")
    axes.bar([x - 0.2 for x in positions], speedups, 0.38, yerr=[below, above], capsize=4, label="measured")
    axes.bar([x + 0.2 for x in positions], ideals, 0.38, color="lightgrey", label="ideal")
    for x, speedup, ideal in zip(positions, speedups, ideals, strict=True):
        axes.text(x - 0.2, 0.05, f"{speedup:.2f}", ha="center", color="white")
        axes.text(x + 0.2, 0.05, f"{ideal:.2f}", ha="center")
    axes.axhline(1, color="black", linewidth=0.8)  # as fast as the dense model
    axes.set_xticks(positions, [case["name"] for case in cases])
    axes.set_ylabel("speedup over the dense model")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=2, frameon=False)
    figure.savefig(path, dpi=150, metadata=dict(metadata or {}))
    pyplot.close(figure)
