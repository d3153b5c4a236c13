"""What people read of a conversion: the table on the terminal, and the model card."""

from rich.console import Console
from rich.table import Table

from converter.plan import Plan


def print_plan(plan: Plan) -> None:
    """Prints the width of every layer and the totals."""
    dense = plan.dense.dense
    table = Table(title=f"{plan.dense.family.architecture} pruned by {plan.info.method}")
    for column in ("layer", "query heads", "KV heads", "FFN channels", "parameters"):
        table.add_column(column, justify="right")
    for index, layer in enumerate(plan.pruned.layers):
        table.add_row(
            str(index),
            f"{layer.num_attention_heads} / {dense.num_attention_heads}",
            f"{layer.num_key_value_heads} / {dense.num_key_value_heads}",
            f"{layer.intermediate_size:,} / {dense.intermediate_size:,}",
            f"{plan.pruned.layer_parameters(index) / plan.dense.layer_parameters(index):.1%}",
        )
    console = Console()
    console.print(table)
    console.print("\n".join(totals(plan)), highlight=False, soft_wrap=True)


def totals(plan: Plan) -> list[str]:
    """Sentences with the sizes before and after."""
    before, after = plan.dense, plan.pruned
    layers_before, layers_after = before.num_layer_parameters, after.num_layer_parameters
    kv_before, kv_after = before.num_key_value_heads, after.num_key_value_heads
    config = plan.config()
    lines = [
        f"Parameters: {before.num_parameters:,} before, {after.num_parameters:,} after "
        f"({1 - after.num_parameters / before.num_parameters:.1%} removed; "
        f"{1 - layers_after / layers_before:.1%} of the layers, embeddings stay).",
        f"Weights: {plan.bytes_of(before) / 1e9:,.3f} GB before, {plan.bytes_of(after) / 1e9:,.3f} GB after.",
        f"KV heads: {kv_before:,} before, {kv_after:,} after; "
        f"a token's KV cache shrinks to {kv_after / kv_before:.1%}.",
        f"Architecture: {config['architectures'][0]}"
        + (" (served by the pruned-vllm plugin)." if "per_layer_config" in config else " (stock; needs no plugin)."),
    ]
    if plan.adapter is not None:
        ranks, count = plan.adapter.ranks, len(plan.adapter.pairs)
        rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        lines.append(f"LoRA adapter: {rank}, merged into {count:,} weights before the masks were folded in.")
    return lines


def model_card(plan: Plan) -> str:
    """README.md of the converted checkpoint."""
    config = plan.config()
    header = ["---", "library_name: vllm", "tags:", "- pruned", f"- {plan.info.method}"]
    if plan.source:
        header.append(f"base_model: {plan.source}")
    plugin = "" if "per_layer_config" not in config else "    pip install pruned-vllm\n"
    rows = "\n".join(
        f"| {i} | {layer.num_attention_heads} | {layer.num_key_value_heads} | {layer.intermediate_size} |"
        for i, layer in enumerate(plan.pruned.layers)
    )
    return "\n".join(
        [
            *header,
            "---",
            "# Structurally pruned model",
            "",
            f"Masks learned by `{plan.info.method}` on `{plan.source or plan.dense.family.architecture}`, "
            "folded into the weights by pruned-vllm.",
            "",
            *(f"- {line}" for line in totals(plan)),
            "",
            "Serve it:",
            "",
            f"{plugin}    vllm serve <this directory>",
            "",
            "| layer | query heads | KV heads | FFN channels |",
            "|---|---|---|---|",
            rows,
            "",
        ]
    )
