"""What `convert-pruned inspect` prints for people."""

from converter.inspection import Inspection
from converter.inspection_keys import ALIGNMENTS, BATCH_SIZES, CONTEXT
from converter.layer_table import print_layers, print_text
from converter.serving_needs import widths
from pruned_vllm.formats.layer import LayerGeometry

KINDS = {
    "converted": "a converted model",
    "stock": "a model whose layers have the sizes that its config.json says",
    "pruned": "a pruned model to be converted",
}


def print_inspection(found: Inspection) -> None:
    """Prints the sizes of every layer, and sentences."""
    by = f", pruned by {found.method}" if found.method else ""
    read = f" (convert-pruned --from {found.format})" if found.kind == "pruned" else ""
    print_text(f"{found.path}: {KINDS[found.kind]}{by}{read}")
    print_layers(*_layers(found), _sentences(found))


def _layers(found: Inspection) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of layers."""
    has_experts = found.geometry.experts is not None
    header = ["layer", "query heads", "KV heads", "FFN channels", *(["experts"] * has_experts), "MB"]
    rows = []
    for index, layer in enumerate(found.geometry.layers):
        row = [str(index), _heads(layer), _count(layer.num_key_value_heads), _count(layer.intermediate_size)]
        row += [_experts(layer)] * has_experts
        rows.append([*row, f"{found.layer_bytes[index] / 1e6:,.3g}"])
    return header, rows


def _count(number: int) -> str:
    return f"{number:,}" if number else "-"


def _heads(layer: LayerGeometry) -> str:
    """The number, and what each KV head has where that differs."""
    total = _count(layer.num_attention_heads)
    return total if layer.has_even_groups else f"{total} ({'+'.join(map(str, layer.query_heads_per_kv_head))})"


def _experts(layer: LayerGeometry) -> str:
    sizes = layer.expert_intermediate_sizes
    if not sizes:
        return "-"
    return f"{len(sizes)} of {min(sizes):,}" + (f" to {max(sizes):,}" if len(set(sizes)) > 1 else "")


def _sentences(found: Inspection) -> list[str]:
    geometry, sizes = found.geometry, widths(found.geometry)
    cache, dense_cache = found.kv_cache_bytes(geometry), found.kv_cache_bytes(found.dense)
    aligned = ", ".join(f"{sum(width % step == 0 for width in sizes)} of {step}" for step in ALIGNMENTS)
    was_pruned = " pruning" if found.dense_parameters != geometry.num_parameters else ""  # else it is quantized
    lines = [
        f"Parameters: {geometry.num_parameters:,}{_before(found.dense_parameters, geometry.num_parameters)}.",
        f"Weights: {found.total_bytes / 1e9:,.3f} GB in {', '.join(found.dtypes)}"
        f"{'' if found.dense_bytes is None else f'; {found.dense_bytes / 1e9:,.3f} GB before{was_pruned}'}.",
        *_quantization(found),
        f"KV cache: {cache:,} bytes per token{_before(dense_cache, cache)}.",
        f"Distinct layer shapes: {len(set(geometry.layers))} in {len(geometry.layers)} layers. "
        f"Of {len(sizes):,} widths, so many are multiples: {aligned}.",
        *_serving(found),
    ]
    if (first := found.ideal_speedup(BATCH_SIZES[0])) is not None:
        by_bytes = [f"{(found.ideal_speedup(size) or first)['bytes']:.2f}x at batch {size}" for size in BATCH_SIZES]
        lines.append(
            f"Ideal speedup of decoding with {CONTEXT:,} tokens of context: {', '.join(by_bytes)} by bytes read, "
            f"{first['flops']:.2f}x by operations."
        )
    return [*lines, *found.notes, *(f"Not known: {sentence}." for sentence in found.unknown)]


def _quantization(found: Inspection) -> list[str]:
    if found.quantization is None:
        return []
    about = found.quantization
    bits = f", {about['num_bits']} bits" if about["num_bits"] else ""
    groups = f" and a scale for each {about['group_size']} inputs" if about["group_size"] else ""
    speedups = ", ".join(f"{found.quantization_speedup(size):.2f}x at batch {size}" for size in BATCH_SIZES)
    return [
        f"Quantization: {about['scheme'] or 'of an unknown kind'}{bits}{groups}. Ideal speedup of decoding over the "
        f"same model before, by bytes read: {speedups}."
    ]


def _before(dense: int | None, now: int | None) -> str:
    return "" if dense is None or now is None or dense == now else f"; {dense:,} before pruning ({now / dense:.1%})"


def _serving(found: Inspection) -> list[str]:
    needs = found.serving
    versions = "".join(f", {name} {version}" for name, version in needs.versions.items())
    software = "vLLM with the plugin pruned-vllm" if needs.needs_plugin else "stock vLLM, no plugin"
    even = ", ".join(map(str, needs.even_tensor_parallel_sizes))
    sizes = f"1 to {needs.largest_tensor_parallel_size}; {even} divide every layer" if needs.needs_plugin else even
    return [
        f"Serving: {needs.architecture}, {software}{versions}.",
        f"Tensor-parallel sizes: {sizes}.",
        *needs.notes,
    ]
