"""Writes the shape of a small pruned model at a size worth timing: config.json files, no weights.

    python -m bench.scale out/ scaled/
    python bench/e2e_speedup.py --dense scaled/dense --pruned scaled/pruned --load-format dummy

Each layer of the large model keeps the share of heads and channels that the small model's layer at the same relative
depth keeps, so a learned ragged pattern can be timed where weights, not overheads, fill the time. Random weights
(`--load-format dummy`) take as long as trained ones.
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from pruned_vllm.command import positive_int, run_command
from pruned_vllm.errors import InputError
from pruned_vllm.files import read_json, write_json
from pruned_vllm.geometry import LayerGeometry, ModelGeometry

# Keys of the small model that say nothing about the large one, or would contradict it.
DROPPED_KEYS = ("per_layer_config", "pruning", "allow_global_per_layer_attribute_access", "layer_types")


def scale_model(config: Mapping, sizes: Mapping, align: int = 1) -> tuple[dict, dict]:
    """The dense and the pruned config.json of a large model with the pattern of a small one.

    Args:
        config: config.json of a small converted model.
        sizes: top-level keys of the large model (hidden_size, num_hidden_layers ...).
        align: FFN widths become multiples of it.

    Raises:
        InputError: `config` is no pruned model, or the sizes contradict each other.
    """
    small = ModelGeometry.from_config(config)
    if small.experts is not None:
        raise InputError("models with experts cannot be scaled yet; give a model with dense MLPs")
    if small.is_dense:
        raise InputError("config.json has no per_layer_config that prunes anything: there is no pattern to scale")
    kept = {key: value for key, value in config.items() if key not in DROPPED_KEYS and not key.endswith("_token_id")}
    dense_config = {**kept, **sizes, "architectures": [small.family.architecture]}
    dense = ModelGeometry.from_config(dense_config)
    num_layers = len(dense.layers)
    sources = [small.layers[(2 * i + 1) * len(small.layers) // (2 * num_layers)] for i in range(num_layers)]
    layers = tuple(_scale_layer(source, small.dense_layers[0], dense.dense_layers[0], align) for source in sources)
    return dense_config, dense.with_layers(layers).to_config(dense_config)


def _scale_layer(source: LayerGeometry, source_dense: LayerGeometry, dense: LayerGeometry, align: int) -> LayerGeometry:
    """`dense` less what `source` lacks against `source_dense`; whole KV groups, at least one of what is not skipped."""
    groups, width = dense.query_heads_per_kv_head, dense.intermediate_size
    kept_heads = source.num_attention_heads / source_dense.num_attention_heads
    kept_channels = source.intermediate_size / source_dense.intermediate_size
    return replace(
        dense,
        query_heads_per_kv_head=groups[: max(1, round(kept_heads * len(groups)))] if kept_heads else (),
        intermediate_size=min(width, max(1, round(kept_channels * width / align)) * align) if kept_channels else 0,
    )


def write_scaled(pruned_dir: Path, out: Path, sizes: Mapping, align: int) -> None:
    """Writes OUT/dense/config.json and OUT/pruned/config.json and prints their sizes. Raises InputError."""
    config_path = pruned_dir / "config.json"
    configs = scale_model(read_json(config_path), sizes, align)
    for name, config in zip(("dense", "pruned"), configs, strict=True):
        directory = out / name
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / "config.json", config)
        geometry = ModelGeometry.from_config(config)
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
    add("pruned", type=Path, metavar="PRUNED_DIR", help="a small model written by convert-pruned")
    add("out", type=Path, metavar="OUT", help="gets OUT/dense/config.json and OUT/pruned/config.json")
    add("--hidden-size", type=positive_int, default=1536, help="default: 1536")
    add("--num-hidden-layers", type=positive_int, default=16, help="default: 16")
    add(
        "--intermediate-size",
        type=positive_int,
        help="default: 8/3 of the hidden size, rounded up to a multiple of 256",
    )
    add("--head-dim", type=positive_int, default=64, help="default: 64")
    add("--num-attention-heads", type=positive_int, help="default: hidden size / head dim")
    add("--num-key-value-heads", type=positive_int, help="default: as many as attention heads")
    add("--vocab-size", type=positive_int, default=32000, help="default: 32000")
    add("--max-position-embeddings", type=positive_int, default=2048, help="default: 2048")
    add("--tie-word-embeddings", action="store_true", help="default: an lm_head of its own")
    add("--align", type=positive_int, default=32, help="FFN widths become multiples of this; 1: any width; default: 32")
    return parser


def main() -> int:
    args = build_parser().parse_args()
    sizes = {key: value for key, value in vars(args).items() if key not in ("pruned", "out", "align")}
    sizes["intermediate_size"] = args.intermediate_size or -(-args.hidden_size * 8 // 3 // 256) * 256
    sizes["num_attention_heads"] = args.num_attention_heads or args.hidden_size // args.head_dim
    sizes["num_key_value_heads"] = args.num_key_value_heads or sizes["num_attention_heads"]
    return run_command("bench.scale", lambda: write_scaled(args.pruned, args.out, sizes, args.align))


if __name__ == "__main__":
    sys.exit(main())
