"""What the reports draw. Every function returns markup of bench.report.drawing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.report.drawing import COLOURS, in_style, new_figure, to_svg
from bench.speed.results import binding

ROW_INCHES = 0.52  # of a case: a line of text above its marks
LABEL_HEIGHT = 0.30  # of it, above the marks
LONGEST_NAME = 32  # letters of a case's name that a phone has room for


@dataclass(frozen=True)
class Gain:
    """One measured speedup.

    Attributes:
        name: what was measured.
        speedup, low, high: median and 95 % interval, None where there is none.
        pairs: the ratio of each pair of runs.
        ideal: from where to where the ideal lies; a single figure is drawn from 0.
    """

    name: str
    speedup: float
    low: float | None
    high: float | None
    pairs: Sequence[float]
    ideal: tuple[float, float]


@in_style
def speedup_figure(gains: Sequence[Gain], name: str) -> str:
    """A row for each: a bar up to the ideal, a dot for each pair of runs, the median and its interval."""
    figure, (axes,) = new_figure(0.75 + ROW_INCHES * len(gains))
    for row, gain in enumerate(gains):
        nearest, best = gain.ideal
        axes.barh(row, best - nearest, 0.34, left=nearest, color=COLOURS["ideal"], alpha=0.55)
        dots = {"color": COLOURS["pruned"], "markersize": 4, "alpha": 0.4, "markeredgewidth": 0}
        axes.plot(gain.pairs, [row] * len(gain.pairs), "o", **dots)
        if gain.low is not None and gain.high is not None:
            axes.plot([gain.low, gain.high], [row, row], color=COLOURS["pruned"], linewidth=2.4, solid_capstyle="butt")
        diamond = {"color": COLOURS["pruned"], "markersize": 6, "markeredgecolor": COLOURS["paper"]}
        axes.plot(gain.speedup, row, "D", **diamond)
        _row_label(axes, row, gain.name, f"{gain.speedup:.2f}x of {_bracket(gain.ideal)}")
    _finish_rows(axes, len(gains), "speedup over the dense model")
    axes.axvline(1, color=COLOURS["ink"], linewidth=0.9, zorder=0.5)
    values = [value for gain in gains for value in (gain.speedup, *gain.ideal, *gain.pairs)]
    axes.set_xlim(0, 1.06 * max(values))
    label = "; ".join(f"{gain.name} {gain.speedup:.2f} of {_bracket(gain.ideal)}" for gain in gains)
    return to_svg(figure, name, f"Measured of ideal speedup: {label}")


def _bracket(ideal: tuple[float, float]) -> str:
    nearest, best = ideal
    return f"{nearest:.2f} to {best:.2f}x" if nearest and nearest != best else f"{best:.2f}x"


def _row_label(axes, row: int, name: str, figures: str) -> None:
    name = name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"
    label = axes.text(
        0.005,
        row - LABEL_HEIGHT,
        f"{name} · {figures}",
        transform=axes.get_yaxis_transform(),
        fontsize=8.5,
        va="center",
        bbox={"facecolor": COLOURS["paper"], "edgecolor": "none", "pad": 1},
    )
    label.set_in_layout(False)


def _finish_rows(axes, count: int, label: str) -> None:
    axes.set_ylim(count - 0.55, -0.62)  # the first case at the top
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(label)
    axes.grid(axis="x", linewidth=0.6)


@in_style
def samples_figure(cases: Sequence[Mapping[str, Any]], name: str) -> str:
    """A row for each case: every run of each model, as a share of the dense median."""
    figure, (axes,) = new_figure(0.75 + ROW_INCHES * len(cases))
    largest = 1.0
    for row, case in enumerate(cases):
        for side, shift in (("dense", -0.06), ("pruned", 0.14)):
            shares = [seconds / case["dense"]["median_latency_s"] for seconds in case[side]["samples_s"]]
            largest = max(largest, *shares)
            axes.plot(
                shares, [row + shift] * len(shares), "o", color=COLOURS[side], markersize=4.5, alpha=0.6,
                markeredgewidth=0, label=side if not row else None,
            )  # fmt: skip
        times = " / ".join(f"{case[side]['median_latency_s'] * 1e3:,.0f}" for side in ("dense", "pruned"))
        _row_label(axes, row, case["name"], f"{times} ms")
    _finish_rows(axes, len(cases), "time of each run, dense median = 1")
    axes.set_xlim(0, 1.06 * largest)
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2, fontsize=8, handletextpad=0.2)
    return to_svg(figure, name, f"Time of every run of {len(cases)} cases, dense and pruned")


@in_style
def limits_figure(cases: Sequence[Mapping[str, Any]], name: str) -> str:
    """A row for each case: for both models the share of the limit that binds."""
    figure, (axes,) = new_figure(0.75 + ROW_INCHES * len(cases))
    for row, case in enumerate(cases):
        shares = {}
        for side, shift in (("dense", -0.03), ("pruned", 0.2)):
            shares[side] = max(case[side]["of_bandwidth"], case[side]["of_gemm_rate"])
            axes.barh(row + shift, shares[side], 0.2, color=COLOURS[side], label=side if not row else None)
        _row_label(axes, row, case["name"], _binding(case, shares))
    _finish_rows(axes, len(cases), "share of the measured limit")
    axes.axvline(1, color=COLOURS["ink"], linewidth=0.9, zorder=0.5)
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2, fontsize=8, handlelength=1.2)
    return to_svg(figure, name, "Share of the measured limit that binds, dense and pruned")


def _binding(case: Mapping[str, Any], shares: Mapping[str, float]) -> str:
    """62% / 58% of memory; with both limits named where each binds another model."""
    binds = {side: binding(case[side]) for side in shares}
    if len(set(binds.values())) == 1:
        return " / ".join(f"{share:.0%}" for share in shares.values()) + f" of {binds['dense']}"
    return " / ".join(f"{share:.0%} of {binds[side]}" for side, share in shares.items())


@in_style
def units_figure(dense: Sequence[int], pruned: Sequence[int], unit: str, name: str) -> str:
    """A bar for each layer: how many `unit`s the dense model has there, and how many the pruned one."""
    figure, (axes,) = new_figure(1.9)
    layers = range(len(dense))
    axes.bar(layers, dense, 0.84, color=COLOURS["ideal"], alpha=0.55, label="dense")
    axes.bar(layers, pruned, 0.84, color=COLOURS["pruned"], label="pruned")
    _finish_layers(axes, len(dense), unit, f"{sum(pruned) / (sum(dense) or 1):.1%} kept")
    return to_svg(figure, name, f"{unit} of each layer, dense and pruned: {sum(pruned)} of {sum(dense)}")


@in_style
def expert_widths_figure(dense: Sequence[Sequence[int]], pruned: Sequence[Sequence[int]], name: str) -> str:
    """A column of dots for each layer, one for every routed expert at its width, below a line at the dense width."""
    figure, (axes,) = new_figure(1.9)
    for layer, (before, after) in enumerate(zip(dense, pruned, strict=True)):
        if before:
            axes.plot([layer - 0.42, layer + 0.42], [max(before)] * 2, color=COLOURS["dense"], linewidth=1.6)
        axes.plot([layer] * len(after), after, "_", color=COLOURS["pruned"], markersize=7, alpha=0.45)
    all_before, all_after = (sum(map(sum, widths)) for widths in (dense, pruned))
    axes.set_ylim(0, 1.05 * max(max(widths, default=0) for widths in dense))
    _finish_layers(
        axes, len(dense), "channels of each expert", f"{all_after / (all_before or 1):.1%} kept", legend=False
    )
    return to_svg(figure, name, f"Widths of routed experts by layer: {all_after} of {all_before} channels")


def _finish_layers(axes, count: int, title: str, kept: str, legend: bool = True) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(f"{title}: {kept}")
    axes.set_xlabel("layer")
    axes.set_xlim(-0.7, count - 0.3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", linewidth=0.6)
    if legend:
        axes.legend(loc="lower right", bbox_to_anchor=(1.02, 0.97), ncols=2, fontsize=8, handlelength=1.0)


@in_style
def latency_figure(curves: Mapping[str, Sequence[tuple[float, float]]], dots: Mapping, latency: str, name: str) -> str:
    """Latency over throughput: a curve for each model, a pale dot for each run.

    Args:
        curves, dots: by model, points of (requests per second, milliseconds): medians of scenarios, and single runs.
        latency: what the milliseconds are.
    """
    figure, (axes,) = new_figure(2.6)
    for side, points in curves.items():
        axes.plot(
            *zip(*sorted(points), strict=True), "o-", color=COLOURS[side], markersize=5, linewidth=1.6, label=side
        )
        faint = {"color": COLOURS[side], "markersize": 3.5, "alpha": 0.35, "markeredgewidth": 0}
        axes.plot(*zip(*dots[side], strict=True), "o", **faint)
    axes.set_xlabel("requests per second")
    axes.set_title(f"{latency}, ms")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.grid(linewidth=0.6)
    axes.legend(loc="upper left", fontsize=8)
    return to_svg(figure, name, f"{latency} over requests per second, dense and pruned")
