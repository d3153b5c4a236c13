"""What people read of a quantization: the table on the terminal, sentences, and the model card."""

from converter.advice import serve_command
from converter.checkpoint import DTYPES
from converter.inspection_keys import BATCH_SIZES, CONTEXT
from converter.layer_table import print_layers
from converter.plan import Plan
from converter.quantize.quantization import Quantization
from converter.quantize.sizes import width_step
from pruned_vllm.formats.cost import layer_bytes, moved_bytes
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.headers import ELEMENT_BYTES


def print_quantization(plan: Plan) -> None:
    """Prints the sizes of every layer, and sentences."""
    title = f"{plan.dense.family.architecture} quantized to {_quantization(plan).scheme.name}"
    caption = "sizes: of the model + padding" if _padded_bytes(plan) else None
    print_layers(*_layer_table(plan), quantization_lines(plan), title=title, caption=caption)


def quantization_lines(plan: Plan) -> list[str]:
    """Sentences about a quantization: what is rounded, sizes, what padding costs, what is gained at best."""
    quantization, written = _quantization(plan), plan.written
    scheme, sizes, total = quantization.scheme, written.sizes, sum(written.sizes.values())
    before = plan.bytes_of(quantization.unpadded)
    rounded = [name for name, origin in written.origins.items() if quantization.quantizes(origin)]
    shapes = plan.pruned.tensor_shapes()
    num_weights = sum(rows * columns for name, (rows, columns) in _matrices(shapes) if quantization.quantizes(name))
    bits = 8 * sum(sizes[name] for name in rounded) / num_weights
    groups = f"; groups of {quantization.group_size or 'all'} inputs" if scheme.has_groups else ""
    lines = [
        f"Quantization: {scheme.name}, {scheme.summary}{groups}; {len(quantization.modules):,} linear layers, "
        f"{bits:.2f} bits for each of their weights. The rest stays as it is.",
        f"Weights: {before / 1e9:,.3g} GB before, {total / 1e9:,.3g} GB quantized ({total / before:.1%}; "
        f"{total:,} bytes).",
    ]
    if (padding := _padded_bytes(plan)) > 0:
        step = width_step(scheme, quantization.group_size, quantization.ranks)
        ranks = f" on {quantization.ranks} ranks" if quantization.ranks > 1 else ""
        lines.append(
            f"Padding: {padding / 1e6:,.3g} MB of zeros ({padding / (total - padding):.1%}), since kernels for "
            f"{scheme.name}{ranks} want widths in multiples of {step}; the output is the same."
        )
    lines.append(_ideal_line(plan))
    if uneven := sum(not layer.shares_heads_evenly(quantization.ranks) for layer in plan.pruned.layers):
        lines.append(
            f"{quantization.ranks} ranks do not share the heads of {uneven} layers evenly: the plugin pads those while "
            "it loads them."
        )
    return [*lines, *filter(None, [scheme.note])]


def _ideal_line(plan: Plan) -> str:
    quantization, sizes = _quantization(plan), plan.written.sizes
    element_bytes = ELEMENT_BYTES[DTYPES[plan.dtype_of("model.embed_tokens.weight")]]

    def speedups(before: ModelGeometry) -> str:
        texts = []
        for batch_size in BATCH_SIZES:
            step = batch_size, batch_size * CONTEXT, element_bytes
            states = 2 * batch_size  # read and written
            speedup = moved_bytes(before, *step, None, states) / moved_bytes(plan.pruned, *step, sizes, states)
            texts.append(f"{speedup:.2f}x at batch {batch_size}")
        return ", ".join(texts)

    what = f"Ideal speedup of decoding with {CONTEXT:,} tokens of context, by bytes read"
    line = f"{what}: {speedups(quantization.unpadded)} over the same model before"
    if plan.dense.num_parameters > quantization.unpadded.num_parameters:
        line += f"; {speedups(plan.dense)} over the dense model"
    return f"{line}."


def quantized_card(plan: Plan) -> str:
    """README.md of a model that was quantized after it was converted."""
    scheme, config = _quantization(plan).scheme, plan.config()
    tags = ["quantized", "compressed-tensors", scheme.name, *(["pruned"] if plan.source.pruning else [])]
    header = ["---", "library_name: vllm", "tags:", *(f"- {tag}" for tag in tags)]
    if plan.source.hub_id:
        header.append(f"base_model: {plan.source.hub_id}")
    plugin = "" if "per_layer_config" not in config else "    pip install pruned-vllm\n"
    columns, rows = _layer_table(plan)
    return "\n".join(
        [
            *header,
            "---",
            "# Quantized model",
            "",
            f"Weights of `{plan.source.hub_id or plan.dense.family.architecture}` rounded to the nearest value by "
            "pruned-vllm, in the format of compressed-tensors.",
            "",
            *(f"- {line}" for line in quantization_lines(plan)),
            "",
            "Serve it:",
            "",
            f"{plugin}    {serve_command(plan, '<this directory>')}",
            "",
            *(f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)),
            "",
            *(["Sizes are those of the model + padding; the padding is zeros.", ""] if _padded_bytes(plan) else []),
        ]
    )


def _layer_table(plan: Plan) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of layers."""
    before, stored = _quantization(plan).unpadded, layer_bytes(plan.written.sizes)
    has_experts = before.experts is not None
    header = ["layer", "query heads", "KV heads", "FFN channels", *["experts' channels"] * has_experts]
    rows = []
    for index, (layer, padded) in enumerate(zip(before.layers, plan.pruned.layers, strict=True)):
        row = [str(index), str(layer.num_attention_heads or "-"), str(layer.num_key_value_heads or "-")]
        row.append(_with_padding(layer.intermediate_size, padded.intermediate_size))
        if has_experts:
            widths = sum(layer.expert_intermediate_sizes), sum(padded.expert_intermediate_sizes)
            row.append(_with_padding(*widths))
        bytes_before = plan.bytes_of_shapes(before.layer_tensor_shapes(index))
        rows.append([*row, f"{bytes_before / 1e6:,.3g}", f"{stored[index] / 1e6:,.3g}"])
    return [*header, "MB before", "MB quantized"], rows


def _with_padding(width: int, padded: int) -> str:
    return (f"{width:,}" if width else "-") + (f"+{padded - width:,}" if padded > width else "")


def _padded_bytes(plan: Plan) -> int:
    """Bytes of what was padded for the kernels."""
    quantization, shapes = _quantization(plan), _quantization(plan).unpadded.tensor_shapes()
    unpadded = quantization.written(shapes, {name: DTYPES[plan.dtype_of(name)] for name in shapes})
    return sum(plan.written.sizes.values()) - sum(unpadded.sizes.values())


def _matrices(shapes: dict[str, tuple[int, ...]]) -> list[tuple[str, tuple[int, int]]]:
    return [(name, (shape[0], shape[1])) for name, shape in shapes.items() if len(shape) == 2]


def _quantization(plan: Plan) -> Quantization:
    if plan.quantization is None:
        raise ValueError("a report of a quantization was asked for, but this plan rounds nothing")
    return plan.quantization
