"""What people read of a conversion: the table on the terminal, and the model card."""

from collections.abc import Callable, Sequence

from converter.advice import serve_command
from converter.checkpoint import ELEMENT_BYTES
from converter.dropped_experts import NOT_EXACT
from converter.layer_table import print_layers
from converter.plan import Plan
from converter.quantize.report import quantization_lines
from pruned_vllm.formats.agreed_config import left_out, told
from pruned_vllm.formats.layer import LayerGeometry


def print_plan(plan: Plan) -> None:
    """Prints the sizes of every layer and the totals."""
    title = f"{plan.dense.family.architecture} pruned by {plan.source.method}"
    caption = "sizes: kept + padding" if _is_padded(plan) else None
    print_layers(*_layer_table(plan), _lines(plan), title=title, caption=caption)


def _lines(plan: Plan) -> list[str]:
    return totals(plan) if plan.quantization is None else [*totals(plan), *quantization_lines(plan)]


def _is_padded(plan: Plan) -> bool:
    return plan.pruned.num_parameters != plan.exact.num_parameters


def _layer_table(plan: Plan) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of layers; what padding costs only where there is any."""
    padded, experts = _is_padded(plan), plan.dense.experts
    sizes: dict[str, Callable[[LayerGeometry], int]] = {
        "query heads": lambda layer: layer.num_attention_heads,
        "KV heads": lambda layer: layer.num_key_value_heads,
        "FFN channels": lambda layer: layer.intermediate_size,
        "experts": lambda layer: sum(layer.expert_intermediate_sizes),
    }
    dense = {name: max(map(size, plan.dense.layers)) for name, size in sizes.items()}
    sizes = {name: size for name, size in sizes.items() if dense[name]}
    header = ["layer", *(f"{name} of {dense[name]:,}" for name in sizes)]
    has_own_number = any(map(_has_own_number, plan.exact.layers, plan.dense.layers))
    header += [f"number of {experts.num_experts:,}"] if experts and has_own_number else []
    header += [f"each of {experts.intermediate_size:,}", "from", "to"] if experts else []
    header += ["MB exact", "MB padded", "lost"] if padded else ["MB", "of dense"]
    rows = []
    for index, (exact, layer) in enumerate(zip(plan.exact.layers, plan.pruned.layers, strict=True)):
        row = [str(index)]
        for size in sizes.values():
            kept, written = size(exact), size(layer)
            padding = f"+{written - kept:,}" if written > kept else ""
            row.append(f"{kept:,}{padding}" if kept else "-")
        if has_own_number:
            row.append(f"{len(exact.expert_intermediate_sizes):,}" if exact.expert_intermediate_sizes else "-")
        if experts:
            row += _spread(exact.expert_intermediate_sizes)
        dense_bytes, exact_bytes, written_bytes = (
            plan.bytes_of_shapes(geometry.layer_tensor_shapes(index))
            for geometry in (plan.dense, plan.exact, plan.pruned)
        )
        row.append(_megabytes(exact_bytes))
        if padded:
            row += [_megabytes(written_bytes), _lost(exact_bytes, written_bytes)]
        else:
            row.append(f"{exact_bytes / dense_bytes:.1%}")
        rows.append(row)
    return header, rows


def _has_own_number(layer: LayerGeometry, dense: LayerGeometry) -> bool:
    return len(layer.expert_intermediate_sizes) != len(dense.expert_intermediate_sizes)


def _spread(widths: Sequence[int]) -> list[str]:
    """Mean, least and most of the widths of a layer's experts."""
    return [f"{sum(widths) / len(widths):,.0f}", f"{min(widths):,}", f"{max(widths):,}"] if widths else ["-"] * 3


def _megabytes(size: int) -> str:
    """Three digits at least: layers of tiny models count too."""
    return f"{size / 1e6:,.1f}" if size >= 1e7 else f"{size / 1e6:.3g}"


def _lost(exact: int, padded: int) -> str:
    """What padding adds, as a share. Sublayers that are gone get no padding, so a padded layer has `exact` above 0."""
    return f"{padded / exact - 1:.1%}" if padded > exact else "-"


def totals(plan: Plan) -> list[str]:
    """Sentences with the sizes before and after."""
    before, after = plan.before, plan.pruned
    layers_before, layers_after = before.num_layer_parameters, after.num_layer_parameters
    kv_before, kv_after = before.num_key_value_heads, after.num_key_value_heads
    config = plan.config()
    removed = (
        f"Parameters: {before.num_parameters:,} before, {after.num_parameters:,} after "
        f"({1 - after.num_parameters / before.num_parameters:.1%} removed; "
        f"{1 - layers_after / layers_before:.1%} of the layers"
        f"{', embeddings stay' if before.hidden_size == after.hidden_size else ''})."
    )
    if plan.cuts_nothing:
        removed = (
            f"Nothing to cut: every layer has the size that config.json says ({after.num_parameters:,} parameters)."
        )
    lines = [
        removed,
        f"Weights: {plan.bytes_of(before) / 1e9:,.3f} GB before, {plan.bytes_of(after) / 1e9:,.3f} GB after.",
        f"KV heads: {kv_before:,} before, {kv_after:,} after; "
        f"a token's KV cache shrinks to {kv_after / kv_before:.1%}.",
        *_linear_totals(plan),
        *_latent_totals(plan),
        *_hidden_totals(plan),
        *_expert_totals(plan),
        *_shape_totals(plan),
        f"Architecture: {config['architectures'][0]}"
        + (" (served by the pruned-vllm plugin)." if "per_layer_config" in config else " (stock; needs no plugin)."),
    ]
    if keys := left_out(before.family, plan.checkpoint.config):
        lines.append(f"Not in the new config.json, since vLLM alone acts on them: {', '.join(keys)}.")
    lines += told(before.family, plan.checkpoint.config)
    if plan.source.changes is not None:
        lines.append(plan.source.changes.describe())
    return [*lines, *plan.source.notes]


def _linear_totals(plan: Plan) -> list[str]:
    """What stays as it is in layers that have linear attention."""
    count = sum(layer.linear_attention for layer in plan.pruned.layers)
    if not count:
        return []
    element_bytes = plan.dtype_of("model.embed_tokens.weight").itemsize
    megabytes = plan.pruned.state_bytes_per_sequence(element_bytes) / 1e6
    return [
        f"{count} of {len(plan.pruned.layers)} layers have linear attention, which stays as it is: {megabytes:,.1f} MB "
        "of state for each sequence, however long it is."
    ]


def _hidden_totals(plan: Plan) -> list[str]:
    """What is left of the hidden states, where they lost any dimension."""
    before, exact, after = (geometry.hidden_size for geometry in (plan.dense, plan.exact, plan.pruned))
    if before == after:
        return []
    padding = f", {after - exact:,} of them padding" if after > exact else ""
    return [f"Hidden size: {before:,} before, {after:,} after{padding}."]


def _latent_totals(plan: Plan) -> list[str]:
    family = plan.dense.family
    return [f"Attention stays whole: {family.architecture} {family.why_heads_stay}."] * family.latent_attention


def _expert_totals(plan: Plan) -> list[str]:
    """What the masks leave of the routed experts."""
    if plan.dense.experts is None:
        return []
    dense, widths = (
        [width for layer in layers for width in layer.expert_intermediate_sizes]
        for layers in (plan.dense.layers, plan.exact.layers)
    )
    if not widths:  # the family has experts, but no layer of this model
        return []
    lines = [
        f"Experts: {len(dense):,} with {sum(dense):,} channels before, {sum(widths):,} after "
        f"({1 - sum(widths) / sum(dense):.1%} removed); {widths.count(0):,} experts lost all."
    ]
    if len(widths) < len(dense):
        counts = [len(layer.expert_intermediate_sizes) for layer in plan.exact.layers]
        counts = [count for count in counts if count]
        least, most = f"{min(counts):,}", f"{max(counts):,}"
        lines.append(
            f"Experts that are left: {len(widths):,}, {least if least == most else f'{least} to {most}'} in a layer."
        )
    if constants := sum(len(layer.constant_experts) for layer in plan.exact.layers):
        lines.append(f"Experts that output a constant: {constants:,}.")
    if plan.dropped is not None:
        lines.append(
            f"Not exact: {sum(map(len, plan.dropped.by_layer.values())):,} experts were dropped with their rows of the "
            f"router (--drop-empty-experts); {NOT_EXACT}."
        )
    return lines


def _shape_totals(plan: Plan) -> list[str]:
    """How many different layers there are, and what it cost to have no more."""
    exact_shapes, shapes = len(set(plan.exact.layers)), len(set(plan.pruned.layers))
    if not _is_padded(plan):
        return [f"Distinct layer shapes: {shapes} in {len(plan.pruned.layers)} layers."]
    exact_bytes, written_bytes = plan.bytes_of(plan.exact), plan.bytes_of(plan.pruned)
    element_bytes = ELEMENT_BYTES[plan.checkpoint.tensors["model.embed_tokens.weight"].dtype]
    exact_cache, cache = (geometry.kv_cache_bytes_per_token(element_bytes) for geometry in (plan.exact, plan.pruned))
    padding = f"Padding: {_megabytes(written_bytes - exact_bytes)} MB of zeros in the weights "
    padding += f"({_lost(exact_bytes, written_bytes)} on top of {_megabytes(exact_bytes)} MB)"
    if cache > exact_cache:
        padding += f", {cache - exact_cache:,} bytes of KV cache per token on top of {exact_cache:,}"
    return [
        f"Distinct layer shapes: {shapes} in {len(plan.pruned.layers)} layers ({exact_shapes} without padding).",
        f"{padding}; the output is the same.",
    ]


def model_card(plan: Plan) -> str:
    """README.md of the converted checkpoint. It may be uploaded, so it names no place on this machine."""
    config = plan.config()
    tags = ["pruned", plan.source.method]
    if plan.quantization is not None:
        tags += ["quantized", "compressed-tensors", plan.quantization.scheme.name]
    header = ["---", "library_name: vllm", "tags:", *(f"- {tag}" for tag in tags)]
    if plan.source.hub_id:
        header.append(f"base_model: {plan.source.hub_id}")
    plugin = "" if "per_layer_config" not in config else "    pip install pruned-vllm\n"
    columns, rows = _layer_table(plan)
    return "\n".join(
        [
            *header,
            "---",
            "# Structurally pruned model",
            "",
            f"Masks learned by `{plan.source.method}` on `{plan.source.hub_id or plan.dense.family.architecture}`, "
            "folded into the weights by pruned-vllm.",
            "",
            *(f"- {line}" for line in _lines(plan)),
            "",
            "Serve it:",
            "",
            f"{plugin}    {serve_command(plan, '<this directory>', '<the dense model>')}",
            "",
            *(f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)),
            "",
            *(["Sizes are kept + padding; the padding is zeros.", ""] if _is_padded(plan) else []),
        ]
    )
