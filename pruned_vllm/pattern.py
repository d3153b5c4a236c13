"""What pruning left, as numbers and pictures: the heads and FFN channels of every layer, the widths of the experts.

    write_report(pattern_of_geometry(geometry), Path("out"))

`write_report` makes a directory out/report, as in figures 4 to 7 of DDP (arXiv 2603.08065):

- pattern.json     the numbers behind the pictures
- heads.png        layers x query heads: which are left
- ffn.png          share of the FFN channels that each layer lost, of all its experts together where it has some
- experts.png      layers x experts: channels left; and how many experts of a layer have how many
- mask_values.png  histogram of what the kept units are multiplied by, where masks are known

`learn-masks --report` draws from masks, `convert-pruned inspect OUT --plot` from config.json, which does not say which
heads of a layer and which channels of an expert are left, only how many. Matplotlib is optional.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pruned_vllm.common.directories import atomic_directory
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import write_json
from pruned_vllm.common.manifest import REPORT_WRITER
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.layer import LayerGeometry
from pruned_vllm.formats.masked import MASK_KEYS, LayerMasks, layer_masks

REPORT_DIRECTORY = "report"  # in a checkpoint; vLLM and Transformers look for nothing there
PATTERN_FILE = "pattern.json"
NUM_BINS = 32  # of histograms


def require_matplotlib() -> None:
    """Call it before long work that ends with pictures. Raises InputError."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError(
            "the pictures need Matplotlib, which is not installed: pip install matplotlib, or pruned-vllm[bench]"
        ) from None


def pattern_of_geometry(geometry: ModelGeometry) -> dict[str, Any]:
    """The numbers of a converted model; padding counts as left.

    The query heads of a KV head stand side by side, those that are left first, and so do the KV heads of a layer.
    """
    group = max(layer.widest_group for layer in geometry.dense_layers)
    rows = []
    for layer, dense in zip(geometry.layers, geometry.dense_layers, strict=True):
        heads = [int(head < kept) for kept in layer.query_heads_per_kv_head for head in range(group)]
        heads += [0] * (dense.num_attention_heads - len(heads))
        rows.append(_row(dense, heads, layer.intermediate_size, layer.expert_intermediate_sizes))
    return _pattern(geometry, rows, head_positions_known=False)


def pattern_of_masks(dense: ModelGeometry, masks: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The numbers of masks, under the keys of pruning_masks.safetensors, for a dense model; 0 removes."""
    rows = []
    of_layers = layer_masks(masks, len(dense.layers))
    for layer, of_layer in zip(dense.layers, of_layers, strict=True):
        heads, channels = [1] * layer.num_attention_heads, layer.intermediate_size
        experts = layer.expert_intermediate_sizes
        if of_layer.head is not None:
            heads = (of_layer.head != 0).astype(int).tolist()
        if of_layer.channel is not None:
            channels = int(np.count_nonzero(of_layer.channel))
        if of_layer.expert is not None:
            experts = np.count_nonzero(of_layer.expert, axis=1).tolist()
        rows.append(_row(layer, heads, channels, experts))
    return _pattern(dense, rows, head_positions_known=True) | {"mask_values": _histograms(of_layers)}


def write_report(pattern: Mapping[str, Any], checkpoint: Path) -> Path:
    """Writes pattern.json and the pictures into `checkpoint`/report, which it returns; replaces a report only.

    Raises:
        InputError: Matplotlib is not installed, or there is a directory `report` that holds something else.
    """
    require_matplotlib()
    pictures = {"heads.png": _draw_heads, "ffn.png": _draw_ffn}
    if pattern["dense"]["num_experts"]:
        pictures["experts.png"] = _draw_experts
    if pattern.get("mask_values"):
        pictures["mask_values.png"] = _draw_mask_values
    directory = checkpoint / REPORT_DIRECTORY
    with atomic_directory(directory, writer=REPORT_WRITER, overwrite=True) as temporary:
        write_json(temporary / PATTERN_FILE, pattern)
        for name, draw in pictures.items():
            draw(pattern).savefig(temporary / name, dpi=150)
    return directory


def _row(dense: LayerGeometry, heads: list[int], channels: int, experts: tuple[int, ...] | list[int]) -> dict[str, Any]:
    """A layer: 1 for each head that is left, widths, and shares removed."""
    before = dense.intermediate_size + sum(dense.expert_intermediate_sizes)
    return {
        "heads": heads,
        "channels": channels,
        "expert_widths": list(experts),
        "heads_removed": 1 - sum(heads) / len(heads) if heads else 0.0,
        "channels_removed": 1 - (channels + sum(experts)) / before,
    }


def _pattern(geometry: ModelGeometry, rows: list[dict[str, Any]], head_positions_known: bool) -> dict[str, Any]:
    dense, experts = geometry.dense_layers, geometry.experts
    return {
        "architecture": geometry.family.architecture,
        "dense": {
            "num_attention_heads": max(layer.num_attention_heads for layer in dense),
            "num_key_value_heads": max(layer.num_key_value_heads for layer in dense),
            "intermediate_size": max(layer.intermediate_size for layer in dense),
            "num_experts": experts.num_experts if experts else 0,
            "expert_intermediate_size": experts.intermediate_size if experts else 0,
        },
        "head_positions_known": head_positions_known,
        "layers": rows,
    }


def _histograms(of_layers: list[LayerMasks[np.ndarray]]) -> dict[str, Any]:
    """By kind of unit, the values that are not 0: counts and edges of the bins."""
    histograms = {}
    for kind in MASK_KEYS:
        found = [mask for mask in (getattr(of_layer, kind) for of_layer in of_layers) if mask is not None]
        values = np.concatenate([mask[mask != 0] for mask in found]) if found else np.empty(0)
        if values.size:
            counts, edges = np.histogram(values, NUM_BINS)
            histograms[kind] = {"counts": counts.tolist(), "edges": edges.tolist()}
    return histograms


def _figure(width: float, height: float, title: str):
    from matplotlib.figure import Figure  # not pyplot: it has global state, and looks for a display

    figure = Figure((width, height), layout="constrained")
    figure.suptitle(title)
    return figure


def _map(axes, values: ArrayLike, xlabel: str, **options):
    """A heat map with a row for each layer; NaN is blank."""
    image = axes.imshow(values, aspect="auto", interpolation="nearest", **options)
    axes.set(xlabel=xlabel, ylabel="layer")
    axes.locator_params(integer=True)
    return image


def _height(pattern: Mapping[str, Any]) -> float:
    return min(10, max(3, 1.5 + 0.15 * len(pattern["layers"])))  # inches


def _draw_heads(pattern: Mapping[str, Any]):
    layers, dense = pattern["layers"], pattern["dense"]
    removed = np.mean([layer["heads_removed"] for layer in layers if layer["heads"]])
    known = "" if pattern["head_positions_known"] else "\n(how many of each KV head; positions are not known)"
    figure = _figure(6, _height(pattern), f"query heads left (dark), {removed:.1%} removed{known}")
    axes = figure.subplots()
    heads, kv_heads = dense["num_attention_heads"], dense["num_key_value_heads"]
    rows = [layer["heads"] or [np.nan] * heads for layer in layers]  # blank: linear attention
    _map(axes, rows, "query head", cmap="Blues", vmin=0, vmax=1)
    if kv_heads < heads:
        for kv_head in range(1, kv_heads):
            axes.axvline(kv_head * heads / kv_heads - 0.5, color="grey", linewidth=0.8)
    return figure


def _draw_ffn(pattern: Mapping[str, Any]):
    removed = [100 * layer["channels_removed"] for layer in pattern["layers"]]
    figure = _figure(6, 3.2, "FFN channels removed")
    axes = figure.subplots()
    axes.bar(range(len(removed)), removed)
    axes.axhline(np.mean(removed), color="black", linewidth=0.8, linestyle="--", label=f"mean {np.mean(removed):.1f} %")
    axes.set(xlabel="layer", ylabel="% of the layer's channels", ylim=(0, 100))
    axes.locator_params(axis="x", integer=True)
    axes.legend()
    return figure


def _draw_experts(pattern: Mapping[str, Any]):
    layers, dense = pattern["layers"], pattern["dense"]
    width = dense["expert_intermediate_size"]
    rows = np.full((len(layers), dense["num_experts"]), np.nan)  # blank: experts that are gone, dense MLPs
    for row, layer in zip(rows, layers, strict=True):
        row[: len(layer["expert_widths"])] = layer["expert_widths"]
    figure = _figure(11, _height(pattern), f"channels left of each expert, of {width:,}")
    by_expert, by_width = figure.subplots(1, 2)
    image = _map(by_expert, rows, "expert", vmin=0, vmax=width)
    figure.colorbar(image, label="channels left")
    edges = np.linspace(0, width, min(NUM_BINS, width) + 1)
    counts = [np.histogram(layer["expert_widths"], edges)[0] for layer in layers]
    extent = (0, width, len(layers) - 0.5, -0.5)
    image = _map(by_width, counts, "channels left", cmap="Greys", extent=extent)
    figure.colorbar(image, label="experts")
    return figure


def _draw_mask_values(pattern: Mapping[str, Any]):
    values = pattern["mask_values"]
    figure = _figure(1 + 4 * len(values), 3.2, "mask values of the units that are left")
    for axes, (kind, histogram) in zip(figure.subplots(1, len(values), squeeze=False)[0], values.items(), strict=True):
        axes.stairs(histogram["counts"], histogram["edges"], fill=True)
        axes.set(xlabel=f"{kind} masks", ylabel="units", yscale="log")
    return figure
