"""Do pruning and quantization multiply? Serves and times a model dense, pruned, quantized, and both.

    python -m bench.quantized --dense SmolLM2-135M-Instruct --pruned real/recovered-20/out --output-dir quantized/
    python -m bench.quantized --pico-moe --output-dir quantized/      # experts: the pico Qwen3-MoE, trained on the spot

Of each pair of models, and each of --schemes: quantize-pruned makes the quantized form of either; all four are served
by vLLM and asked for perplexity on held-out text, in blocks of 128 tokens; then they live side by side and decode in
turns, as in bench/e2e_speedup.py. What is not quantized is bfloat16, or float32 on a CPU that multiplies bfloat16
slower. Ideal speedups are ratios of the bytes that a step reads: weights as they lie in memory, scales, and the KV
cache. What vLLM refuses is written down with its sentence, and the rest goes on.

Ctrl-C stops it; the same command goes on from there. --output-dir keeps the models, logs of the servers, a record of
each step in records/, and in the end quantized.json and quantized.png.
"""

import argparse
import shlex
import sys
from pathlib import Path

from bench.real.records import Records
from bench.speed.setting import add_cases_argument
from converter.quantize.schemes import SCHEMES
from pruned_vllm.common.arguments import positive_int
from pruned_vllm.common.command import run_command
from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.ideal import Case

DEFAULT_CASES = ("decode:1:32:64", "decode:8:32:64")
DEFAULT_SCHEMES = ("w8a8-int8", "w4a16")  # fp8 has no fast kernel on CPUs


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.quantized", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dense", type=Path, metavar="DIR", help="a model with its tokenizer")
    add("--pruned", type=Path, metavar="DIR", help="what convert-pruned made of it")
    add("--pico-moe", action="store_true", help="also the pico Qwen3-MoE, pruned by DDP; learning takes some minutes")
    add("--output-dir", type=Path, default=Path("quantized"), metavar="DIR", help="created; default: quantized")
    add(
        "--schemes",
        nargs="+",
        choices=tuple(SCHEMES),
        default=list(DEFAULT_SCHEMES),
        metavar="SCHEME",
        help=f"of quantize-pruned: {', '.join(SCHEMES)}; default: {' '.join(DEFAULT_SCHEMES)}",
    )
    add("--eval-data", nargs="+", type=Path, default=[], metavar="FILE", help="UTF-8 text; default: Python's own")
    add_cases_argument(parser, DEFAULT_CASES)
    add("--repeats", type=positive_int, default=7, help="runs per case and engine after one warm-up; default: 7")
    add("--rounds", type=positive_int, default=1, help="times that all engines are started; default: 1")
    add("--eager", action="store_true", help="no compilation; default: compiled, as vllm serve does")
    add(
        "--force",
        nargs="+",
        default=[],
        metavar="STEP",
        help="do again: a step by its name in records/, or all of a kind: learn, quantize, serve, speed",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if (args.dense is None) != (args.pruned is None):
        parser.error("--dense and --pruned go together")
    if args.dense is None and not args.pico_moe:
        parser.error("give --dense and --pruned, or --pico-moe, or all")
    command = shlex.join(["python", "-m", "bench.quantized", *(sys.argv[1:] if argv is None else argv)])
    return run_command("bench.quantized", lambda: run(args, command))


def run(args: argparse.Namespace, command: str) -> None:
    """Runs what is not done yet and writes the results. Raises InputError when a step fails."""
    from bench.quantized.plan import Settings, named_pair, pico_pair, planned
    from bench.quantized.results import collect, write
    from bench.quantized.steps import run_steps
    from bench.tables.quantized import summary

    check_cases(args.cases)
    work = args.output_dir
    work.mkdir(parents=True, exist_ok=True)
    settings = Settings(tuple(args.schemes), tuple(args.cases), args.repeats, args.rounds, not args.eager)
    pairs = [] if args.dense is None else [named_pair(args.dense, args.pruned, args.eval_data, work)]
    pairs += [pico_pair(work)] if args.pico_moe else []
    records = Records(work, planned(pairs, settings), args.force)
    run_steps(pairs, settings, work, records)
    results = collect(pairs, settings, records, command)
    write(results, work)
    print(summary(results))
    print(f"written: {work}/quantized.json, {work}/quantized.png")


def check_cases(cases: list[Case]) -> None:
    """Raises InputError for prefills: operations, not bytes, bound them."""
    if wrong := [case.name for case in cases if case.kind != "decode"]:
        raise InputError("--cases must decode, where bytes count; these do not:", wrong)


if __name__ == "__main__":
    sys.exit(main())
