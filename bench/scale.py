"""Writes the shape of a small pruned model at a size worth timing: config.json files, no weights.

    python -m bench.scale out/ scaled/           # out/: any converted model
    python -m bench.scale beta:0.5 scaled/       # no model: a Qwen3-MoE whose experts keep half of their channels
    python bench/e2e_speedup.py --dense scaled/dense --pruned scaled/pruned --load-format dummy

Each layer of the large model keeps the share of KV heads, query heads and channels that the small model's layer at the
same relative depth keeps, so a learned ragged pattern can be timed where weights, not overheads, fill the time. Random
weights (`--load-format dummy`) take as long as trained ones.

With experts, a layer's source is at the same relative depth among the layers that have experts, or have none, as it
does. Its experts' shares are the quantiles of the source's, linear between them where the large layer has more
experts: repeating widths would make classes of equal experts that no learned model has. Their order is drawn anew in
each layer. `beta:KEEP` spreads the shares like the beta distribution of that mean (bench/speed/widths.py), in every
layer alike, and removes no heads. The defaults make about half a billion parameters with and without experts.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.speed.widths import beta_shares, quantiles, widths_of
from pruned_vllm.common.arguments import positive_int
from pruned_vllm.common.command import run_command
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import read_json, write_json
from pruned_vllm.formats.config import converted_config, without_converted_keys
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.layer import LayerGeometry

MOE_OPTIONS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")

# config.json of Qwen/Qwen3-30B-A3B without keys that change neither shapes nor speed. Its sizes get replaced.
QWEN3_MOE: dict[str, Any] = {
    "architectures": ["PrunedQwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_hidden_layers": 1,
    "vocab_size": 151936,
    "moe_intermediate_size": 1_000_000,  # a width of this model is then a share in millionths
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
}


def read_pattern(source: str) -> dict:
    """config.json of the small model: a directory's, or one made up for "beta:KEEP". Raises InputError."""
    kind, colon, text = source.partition(":")
    if kind != "beta" or not colon:
        return read_json(Path(source) / "config.json")
    try:
        keep = float(text)
    except ValueError:
        raise InputError(f"{source!r}: what follows beta: is the mean share that experts keep, e.g. beta:0.5") from None
    shares = beta_shares(keep, QWEN3_MOE["num_experts"])
    widths = widths_of(shares, QWEN3_MOE["moe_intermediate_size"])
    return {**QWEN3_MOE, "per_layer_config": {"0": {"expert_intermediate_sizes": list(widths)}}}


def scale_model(config: Mapping, sizes: Mapping, align: int = 1) -> tuple[dict, dict]:
    """The dense and the pruned config.json of a large model with the pattern of a small one.

    Args:
        config: config.json of a small converted model.
        sizes: top-level keys of the large model (hidden_size, num_hidden_layers ...); with experts also MOE_OPTIONS,
            whatever the family calls them.
        align: FFN widths become multiples of it.

    Raises:
        InputError: `config` is no pruned model, or the sizes contradict each other.
    """
    small = ModelGeometry.from_config(config)
    if small.is_dense:
        raise InputError("config.json has no per_layer_config that prunes anything: there is no pattern to scale")
    plain = without_converted_keys(config, small.family)
    # What does not hold for a model of another depth and vocabulary.
    kept = {key: value for key, value in plain.items() if key != "layer_types" and not key.endswith("_token_id")}
    dense_config = {**kept, **_family_keys(small, config, sizes), "architectures": [small.family.architecture]}
    dense = ModelGeometry.from_config(dense_config)
    layers, chosen = [], dense.experts.num_experts_per_tok if dense.experts else 0
    for index, layer in enumerate(dense.dense_layers):
        source = _counterpart(index, dense.dense_layers, small.dense_layers)
        layers.append(_scale_layer(small.layers[source], small.dense_layers[source], layer, align, index, chosen))
    return dense_config, converted_config(dense.with_layers(tuple(layers)), dense_config)


def _family_keys(small: ModelGeometry, config: Mapping, sizes: Mapping) -> dict:
    """`sizes` under the names that the family has for them. A shared MLP keeps its ratio to a routed expert."""
    names = small.family.experts
    keys = {key: value for key, value in sizes.items() if key not in MOE_OPTIONS}
    if names is None:
        return keys
    keys |= names.with_count(config, sizes["num_experts"])
    keys |= {"num_experts_per_tok": sizes["num_experts_per_tok"], names.width_key: sizes["moe_intermediate_size"]}
    if names.shared_width_key is not None:
        ratio = small.dense_experts.shared_intermediate_size / small.dense_experts.intermediate_size
        keys[names.shared_width_key] = round(ratio * sizes["moe_intermediate_size"])
    return keys


def _counterpart(index: int, large: Sequence[LayerGeometry], small: Sequence[LayerGeometry]) -> int:
    """Index of the small model's layer of the same kind, with experts or without, at the same relative depth."""

    def alike(layers: Sequence[LayerGeometry]) -> list[int]:
        kind = bool(large[index].expert_intermediate_sizes)
        return [i for i, layer in enumerate(layers) if bool(layer.expert_intermediate_sizes) == kind]

    place, count, candidates = alike(large).index(index), len(alike(large)), alike(small)
    if not candidates:
        kind = "experts" if large[index].expert_intermediate_sizes else "a dense MLP"
        raise InputError(f"layer {index} of the large model has {kind}, which no layer of the small one has")
    return candidates[(2 * place + 1) * len(candidates) // (2 * count)]


def _scale_layer(
    source: LayerGeometry, source_dense: LayerGeometry, dense: LayerGeometry, align: int, seed: int, least_experts: int
) -> LayerGeometry:
    """`dense` less what `source` lacks against `source_dense`; at least one unit of what is not skipped, and
    `least_experts` experts."""
    width, kept_groups = dense.intermediate_size, _scale_groups(source, source_dense, dense)
    if source_dense.intermediate_size:
        kept_channels = source.intermediate_size / source_dense.intermediate_size
        width = min(width, max(1, round(kept_channels * width / align)) * align) if kept_channels else 0
    if dense.expert_intermediate_sizes:
        kept = [expert / source_dense.expert_width for expert in source.expert_intermediate_sizes]
        count = len(kept) * len(dense.expert_intermediate_sizes) // len(source_dense.expert_intermediate_sizes)
        shares = quantiles(kept, max(count, least_experts))
        widths = widths_of(shares, dense.expert_width, align, seed)
        layer = replace(dense, query_heads_per_kv_head=kept_groups, intermediate_size=width)
        return replace(layer, expert_intermediate_sizes=widths)
    return replace(dense, query_heads_per_kv_head=kept_groups, intermediate_size=width)


def _scale_groups(source: LayerGeometry, source_dense: LayerGeometry, dense: LayerGeometry) -> tuple[int, ...]:
    """Query heads of each KV head that is left in `dense`: the share of KV heads that `source` keeps, and of the query
    heads of those. Uneven groups are spread like the source's, by increasing size."""
    if not source.query_heads_per_kv_head:
        return ()
    full, source_full = dense.widest_group, source_dense.widest_group
    kept_kv_heads = source.num_key_value_heads / source_dense.num_key_value_heads
    num_kv_heads = max(1, round(kept_kv_heads * dense.num_key_value_heads))
    filled = source.num_attention_heads / (source.num_key_value_heads * source_full)
    num_heads = round(num_kv_heads * full * filled)
    if num_heads < num_kv_heads:
        raise InputError(
            f"a KV head of the small model keeps {filled:.0%} of its {source_full} query heads, which is less than one "
            f"of the large model's {full}; choose a smaller --num-key-value-heads, for example "
            f"{max(1, dense.num_attention_heads // source_full)}"
        )
    shares = quantiles([group / source_full for group in source.query_heads_per_kv_head], num_kv_heads)
    groups = [1] * num_kv_heads
    while sum(groups) < num_heads:
        open_groups = [index for index, group in enumerate(groups) if group < full]
        groups[max(open_groups, key=lambda index: shares[index] * full - groups[index])] += 1
    return tuple(groups)


def write_scaled(config: Mapping, out: Path, sizes: Mapping, align: int) -> None:
    """Writes OUT/dense/config.json and OUT/pruned/config.json and prints their sizes. Raises InputError."""
    configs = scale_model(config, sizes, align)
    for name, written in zip(("dense", "pruned"), configs, strict=True):
        directory = out / name
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / "config.json", written)
        geometry = ModelGeometry.from_config(written)
        print(
            f"{directory}: {geometry.num_parameters / 1e6:,.0f}M parameters, "
            f"{geometry.num_parameters * 2 / 1e9:,.2f} GB in bfloat16, "
            f"{geometry.kv_cache_bytes_per_token(2):,} bytes of KV cache per token, "
            f"{len(set(geometry.layers))} distinct layer shapes"
        )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", metavar="PRUNED_DIR", help="a small model written by convert-pruned, or beta:KEEP")
    add("out", type=Path, metavar="OUT", help="gets OUT/dense/config.json and OUT/pruned/config.json")
    add("--hidden-size", type=positive_int, help="default: 1536, with experts 1024")
    add("--num-hidden-layers", type=positive_int, help="default: 16, with experts 8")
    add(
        "--intermediate-size",
        type=positive_int,
        help="of dense MLPs; default: 8/3 of the hidden size, rounded up to a multiple of 256",
    )
    add("--num-experts", type=positive_int, default=32, help="default: 32")
    add("--num-experts-per-tok", type=positive_int, default=4, help="default: 4")
    add("--moe-intermediate-size", type=positive_int, default=512, help="width of an expert; default: 512")
    add("--head-dim", type=positive_int, default=64, help="default: 64")
    add("--num-attention-heads", type=positive_int, help="default: hidden size / head dim")
    add("--num-key-value-heads", type=positive_int, help="default: as many as attention heads")
    add("--vocab-size", type=positive_int, default=32000, help="default: 32000")
    add("--max-position-embeddings", type=positive_int, default=2048, help="default: 2048")
    add("--tie-word-embeddings", action="store_true", help="default: an lm_head of its own")
    add("--align", type=positive_int, default=32, help="FFN widths become multiples of this; 1: any width; default: 32")
    return parser


def _run(args: argparse.Namespace) -> None:
    config = read_pattern(args.source)
    sizes = {key: value for key, value in vars(args).items() if key not in ("source", "out", "align")}
    has_experts = ModelGeometry.from_config(config).experts is not None
    hidden_size = args.hidden_size or (1024 if has_experts else 1536)
    sizes["hidden_size"] = hidden_size
    sizes["num_hidden_layers"] = args.num_hidden_layers or (8 if has_experts else 16)
    sizes["intermediate_size"] = args.intermediate_size or -(-hidden_size * 8 // 3 // 256) * 256
    sizes["num_attention_heads"] = args.num_attention_heads or hidden_size // args.head_dim
    sizes["num_key_value_heads"] = args.num_key_value_heads or sizes["num_attention_heads"]
    write_scaled(config, args.out, sizes, args.align)


def main() -> int:
    args = build_parser().parse_args()
    return run_command("bench.scale", lambda: _run(args))


if __name__ == "__main__":
    sys.exit(main())
