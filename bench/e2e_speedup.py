"""Times a pruned model against its dense original on real vLLM, and compares the speedup with the ideal one.

    python bench/e2e_speedup.py --dense MODEL --pruned out/
    python bench/e2e_speedup.py --dense scaled/dense --pruned scaled/pruned --load-format dummy --cases decode:1:32:64

Both engines live at the same time, each in processes of its own, and take turns; the speedup is the median of the
ratios of neighbouring runs, so a slow phase of the machine hits both sides. Prints a table and writes
e2e_speedup.json and e2e_speedup.png to --output-dir. The machine needs memory for both models. bench/speed/engines.py
says what is timed, bench/speed/ideal.py what the ideal speedup counts.

On CPU, vLLM gives the engine all cores but one, which its scheduler needs; VLLM_CPU_OMP_THREADS_BIND says otherwise.
"""

import argparse
import shlex
import sys
from pathlib import Path

if not __package__:  # run as a script: search the repository root instead of bench/, as `python -m` does
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.speed.engines import engine_options, measure, running_engines, summarise
from bench.speed.ideal import Case, ideal_speedup
from bench.speed.setting import describe_hardware, describe_model, describe_versions, read_models
from pruned_vllm.common.arguments import positive_int
from pruned_vllm.common.command import run_command
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import write_json

DEFAULT_CASES = ("decode:1:32:64", "decode:8:32:64", "prefill:1:512", "prefill:4:512")


def compare(
    dense_dir: Path,
    pruned_dir: Path,
    *,
    cases: list[Case],
    repeats: int = 7,
    load_format: str = "auto",
    dtype: str = "auto",
    max_model_len: int | None = None,
    compile: bool = False,
) -> dict:
    """Times `cases` on both models and returns what e2e_speedup.json holds, less the command."""
    needed = max(case.input_len + case.output_len for case in cases)
    max_model_len = max_model_len or needed
    if max_model_len < needed:
        raise InputError(f"--max-model-len {max_model_len} is too small: the longest of the --cases needs {needed}")
    dense, pruned = read_models(dense_dir, pruned_dir, max_model_len, load_format)
    options = engine_options(
        dense, cases, load_format=load_format, dtype=dtype, max_model_len=max_model_len, compile=compile
    )
    with running_engines([str(dense_dir), str(pruned_dir)], options) as engines:
        dtypes = [engine.model_config.dtype for engine in engines]
        if dtypes[0] != dtypes[1]:
            raise InputError(f"--dense runs in {dtypes[0]}, --pruned in {dtypes[1]}; choose one with --dtype")
        element_bytes = dtypes[0].itemsize
        setting = {
            "models": {
                "dense": describe_model(dense_dir, dense, element_bytes),
                "pruned": describe_model(pruned_dir, pruned, element_bytes),
            },
            "settings": {
                "repeats": repeats,
                "load_format": load_format,
                "dtype": str(dtypes[0]).removeprefix("torch."),
                "max_model_len": max_model_len,
                "compile": compile,
            },
            "versions": describe_versions(),
            "hardware": describe_hardware(),
        }
        samples = measure(engines, cases, dense.vocab_size, repeats)
    ideals = {case: ideal_speedup(dense, pruned, case, element_bytes) for case in cases}
    records = []
    for case in cases:
        dense_seconds, pruned_seconds = samples[case]
        records.append(summarise(case, dense_seconds, pruned_seconds, ideals[case]))
    return {"cases": records, **setting}


def case(text: str) -> Case:
    """Type of a command line argument."""
    try:
        return Case.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench/e2e_speedup.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dense", type=Path, required=True, metavar="DIR", help="the model before pruning")
    add("--pruned", type=Path, required=True, metavar="DIR", help="what convert-pruned made of it")
    add("--output-dir", type=Path, default=Path("results"), metavar="DIR", help="created; default: results")
    add(
        "--cases",
        type=case,
        nargs="+",
        default=[Case.parse(text) for text in DEFAULT_CASES],
        metavar="CASE",
        help=f"decode:BATCH:INPUT:OUTPUT or prefill:BATCH:INPUT, in tokens; default: {' '.join(DEFAULT_CASES)}",
    )
    add("--repeats", type=positive_int, default=7, help="runs per case and engine after one warm-up; default: 7")
    add(
        "--load-format",
        choices=("auto", "dummy"),
        default="auto",
        help="dummy: random weights, the directories need a config.json only (see bench/scale.py); default: auto",
    )
    add(
        "--dtype",
        choices=("auto", "bfloat16", "float16", "float32"),
        help="default: auto (as config.json says), bfloat16 with --load-format dummy",
    )
    add("--max-model-len", type=positive_int, metavar="TOKENS", help="default: what the longest case needs")
    add("--compile", action="store_true", help="let vLLM compile (CUDA graphs on a GPU); default: eager for both")
    return parser


def main() -> int:
    args = build_parser().parse_args()
    return run_command("e2e_speedup", lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    from rich.console import Console

    from bench.speed.report import models_table, plot_speedups, results_table

    results = compare(
        args.dense,
        args.pruned,
        cases=args.cases,
        repeats=args.repeats,
        load_format=args.load_format,
        dtype=args.dtype or ("bfloat16" if args.load_format == "dummy" else "auto"),
        max_model_len=args.max_model_len,
        compile=args.compile,
    )
    results["command"] = shlex.join(["python", "bench/e2e_speedup.py", *sys.argv[1:]])
    console = Console()
    console.print(models_table(results["models"]), results_table(results["cases"]))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    json_path, plot_path = (args.output_dir / f"e2e_speedup.{suffix}" for suffix in ("json", "png"))
    write_json(json_path, results)
    plot_speedups(results["cases"], plot_path)
    console.print(f"written: {json_path}, {plot_path}")


if __name__ == "__main__":
    sys.exit(main())
