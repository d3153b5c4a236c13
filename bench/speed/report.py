"""Shows e2e results: a table for the terminal and a plot of measured against ideal speedups."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from bench.speed.statistics import interval_text


def results_table(cases: Sequence[Mapping]) -> Table:
    table = numbers_table(
        "case", "dense\nms", "pruned\nms", "dense\ntok/s", "pruned\ntok/s", "speedup", "95 %", "ideal", "of\nideal"
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
            interval_text(case, "-"),
            f"{case['ideal_speedup']:.2f}x",
            f"{case['of_ideal']:.2f}",
        )
    return table


def machine_table(results: Mapping) -> Table:
    """How near to what the machine can do the contestants come, and what the plugin's class changes without pruning."""
    machine = results["machine"]
    table = numbers_table("case", "model", "ms\na step", "GB/s", "of\nlimit", "TFLOP/s", "of\nlimit", "speedup")
    table.title = (
        f"this machine, {machine['threads']} threads: reads {machine['bandwidth_gb_per_s']:.1f} GB/s, multiplies "
        f"{machine['gemm_tflop_per_s']:.3f} TFLOP/s in {machine['dtype']}"
    )
    for case in results["cases"]:
        for name in results["models"]:
            record = case[name]
            speedup = case if name == "pruned" else record
            table.add_row(
                case["name"] if name == "dense" else "",
                name,
                f"{record['step_s'] * 1e3:.2f}",
                f"{record['gb_per_s']:.1f}",
                f"{record['of_bandwidth']:.0%}",
                f"{record['tflop_per_s']:.3f}",
                f"{record['of_gemm_rate']:.0%}",
                f"{speedup['speedup']:.2f}x {interval_text(speedup, '-')}" if "speedup" in speedup else "",
            )
    return table


def models_table(models: Mapping[str, Mapping]) -> Table:
    table = numbers_table("model", "parameters", "KV bytes\nper token", "KV tokens\nper GiB")
    for name, model in models.items():
        table.add_row(
            name,
            f"{model['parameters']:,}",
            f"{model['kv_cache_bytes_per_token']:,}",
            f"{model['kv_cache_tokens_per_gib']:,}",
        )
    return table


def numbers_table(name: str, *numbers: str) -> Table:
    table = Table(box=box.SIMPLE, padding=0)
    table.add_column(name, no_wrap=True)
    for header in numbers:
        table.add_column(header, justify="right", no_wrap=True)
    return table


def plot_speedups(cases: Sequence[Mapping], path: Path) -> None:
    """Writes a PNG: per case a bar for the measured speedup, whiskers at its quartiles, and one for the ideal."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    speedups, ideals = ([case[key] for case in cases] for key in ("speedup", "ideal_speedup"))
    below = [case["speedup"] - case["speedup_q1"] for case in cases]
    above = [case["speedup_q3"] - case["speedup"] for case in cases]
    positions = range(len(cases))
    figure, axes = pyplot.subplots(figsize=(2.2 + 1.5 * len(cases), 4.2), layout="constrained")
    axes.bar([x - 0.2 for x in positions], speedups, 0.38, yerr=[below, above], capsize=4, label="measured, quartiles")
    axes.bar([x + 0.2 for x in positions], ideals, 0.38, color="lightgrey", label="ideal")
    for x, speedup, ideal in zip(positions, speedups, ideals, strict=True):
        axes.text(x - 0.2, 0.05, f"{speedup:.2f}", ha="center", color="white")
        axes.text(x + 0.2, 0.05, f"{ideal:.2f}", ha="center")
    axes.axhline(1, color="black", linewidth=0.8)  # as fast as the dense model
    axes.set_xticks(positions, [case["name"] for case in cases])
    axes.set_ylabel("speedup over the dense model")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=2, frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
