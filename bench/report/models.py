"""Sections that all kinds of results share: the models and their widths, commands, versions, hardware."""

import json
from collections.abc import Mapping
from typing import Any

from bench.report.content import Block, Code, Figure, Fold, Raw, Section, Table, Text, significant
from bench.report.figures import expert_widths_figure, units_figure
from bench.report.results import Result

LAYER_UNITS = {
    "num_attention_heads": "query heads",
    "num_key_value_heads": "KV heads",
    "intermediate_size": "FFN channels",
}


def model_section(models: Mapping[str, Mapping[str, Any]], key: str) -> Section:
    """Sizes of both models and what each layer of them has."""
    rows = []
    for name, model in models.items():
        rows.append(
            (
                name,
                f"{model['parameters']:,}",
                str(model["distinct_layer_shapes"]),
                f"{model['kv_cache_bytes_per_token']:,}",
                f"{model['kv_cache_tokens_per_gib']:,}",
                model["path"],
            )
        )
    header = ("model", "parameters", "distinct layer shapes", "KV bytes per token", "KV tokens per GiB", "path")
    blocks: list[Block] = [Table(header, rows)]
    return Section("Models", [*blocks, *width_blocks(models, key)])


def width_blocks(models: Mapping[str, Mapping[str, Any]], key: str) -> list[Block]:
    """Heads, channels and expert widths of each layer; a sentence where the result does not say them."""
    dense, pruned = models["dense"].get("layers"), models["pruned"].get("layers")
    if not dense or not pruned:
        return [Text("This result was written before results said how wide each layer is.")]
    blocks: list[Block] = []
    for unit, name in LAYER_UNITS.items():
        before, after = ([layer.get(unit, 0) for layer in layers] for layers in (dense, pruned))
        if any(before):
            svg = units_figure(before, after, name, f"{key}-{unit}")
            blocks.append(
                Figure(svg, f"{name[0].upper()}{name[1:]} of each layer: {sum(after):,} of {sum(before):,} are left.")
            )
    before, after = ([layer.get("expert_intermediate_sizes", []) for layer in layers] for layers in (dense, pruned))
    if any(before):
        svg = expert_widths_figure(before, after, f"{key}-experts")
        blocks.append(Figure(svg, "Channels of each routed expert; the line is the width before pruning."))
    return [*blocks, Fold("Widths as numbers", [widths_table(dense, pruned)])]


def widths_table(dense: list[Mapping[str, Any]], pruned: list[Mapping[str, Any]]) -> Table:
    """A row for each layer, "left of before"."""
    has_experts = any(layer.get("expert_intermediate_sizes") for layer in dense)
    header = ["layer", *LAYER_UNITS.values(), *(["experts (least, mean, most channels)"] if has_experts else [])]
    rows = []
    for index, (before, after) in enumerate(zip(dense, pruned, strict=True)):
        row = [str(index), *(f"{after.get(unit, 0):,} of {before.get(unit, 0):,}" for unit in LAYER_UNITS)]
        if has_experts:
            widths = after.get("expert_intermediate_sizes") or []
            spread = f"{min(widths):,}, {sum(widths) / len(widths):,.0f}, {max(widths):,}" if widths else ""
            row.append(f"{len(widths)}: {spread} of {max(before['expert_intermediate_sizes']):,}" if widths else "")
        rows.append(row)
    return Table(header, rows)


def setting_section(content: Mapping[str, Any]) -> Section:
    """The command and everything that it ran on."""
    blocks: list[Block] = []
    if command := content.get("command"):
        blocks.append(Code(str(command)))
    for title, key in (("settings", "settings"), ("versions", "versions"), ("hardware", "hardware")):
        if values := content.get(key):
            blocks.append(Table((title, ""), [(name, shown(value)) for name, value in flattened(values).items()]))
    return Section("Command, versions, hardware", blocks)


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}; empty objects vanish."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def shown(value: Any) -> str:
    """A value of JSON for people."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "-"
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    if isinstance(value, float):
        return significant(value, 4)
    return f"{value:,}" if isinstance(value, int) else str(value)


def counted(count: int, noun: str) -> str:
    """1 pair, 2 pairs"""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def raw_section(result: Result) -> Section:
    name = result.name.replace("\\", "/").rsplit("/", 1)[-1]
    return Section("Raw result", [Raw(name, json.dumps(result.content, indent=1))])
