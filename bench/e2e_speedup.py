"""Times a pruned model against its dense original on real vLLM, and compares the speedup with the ideal one.

    python bench/e2e_speedup.py --dense MODEL --pruned out/
    python bench/e2e_speedup.py --dense scaled/dense --pruned scaled/pruned --load-format dummy --cases decode:1:32:64
    python bench/e2e_speedup.py --dense MODEL --null-test      # can figures of this machine be trusted?

Both engines live at the same time, each in processes of its own, and take turns; the speedup is the median of the
ratios of neighbouring runs, so a slow phase of the machine hits both sides. Before that the memory bandwidth and the
rate of products that this machine reaches are measured, and results say how near to them both models come. Prints
tables and writes e2e_speedup.json, e2e_speedup.png and a report (report.html, report.md) to --output-dir. The machine
needs memory for both models. bench/speed/engines.py says what is timed, pruned_vllm/formats/ideal.py what the ideal
speedup counts, bench/speed/statistics.py what the intervals hold, bench/speed/results.py what is in the JSON file.

On CPU, vLLM gives the engine all cores but one, which its scheduler needs; VLLM_CPU_OMP_THREADS_BIND says otherwise.
"""

import argparse
import shlex
import sys
from pathlib import Path

if not __package__:  # run as a script: search the repository root instead of bench/, as `python -m` does
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.speed.engines import through_plugin
from bench.speed.memory import loaded_bytes
from bench.speed.null_test import measure_equal_and_slowed, shown, verdict
from bench.speed.results import case_record, describe_model
from bench.speed.setting import (
    Setting,
    add_setting_arguments,
    chosen_settings,
    read_models,
    run_in_rounds,
    time_models,
)
from bench.speed.statistics import named_warnings
from pruned_vllm.common.arguments import positive_int
from pruned_vllm.common.command import run_command
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import write_json

DEFAULT_CASES = ("decode:1:32:64", "decode:8:32:64", "prefill:1:512", "prefill:4:512")


def compare(dense_dir: Path, pruned_dir: Path, *, plugin_dense: bool = False, **settings) -> dict:
    """Times the cases on both models and returns what e2e_speedup.json holds, less the command.

    Args:
        plugin_dense: time the dense model through the plugin's class, too.
        settings: see `Setting`.
    """
    setting = Setting(**settings)
    dense, pruned = read_models(
        {"--dense": dense_dir, "--pruned": pruned_dir}, setting.context_length, setting.load_format
    )
    geometries = {"dense": dense, "pruned": pruned}
    models: dict[str, dict] = {"dense": {"model": str(dense_dir)}, "pruned": {"model": str(pruned_dir)}}
    if plugin_dense:
        geometries["plugin_dense"] = dense
        models["plugin_dense"] = models["dense"] | through_plugin(dense)
    samples, dtype, machine = time_models(setting, dense, list(models.values()))
    element_bytes = dtype.itemsize
    tensor_bytes = {name: loaded_bytes(Path(model["model"]), element_bytes) for name, model in models.items()}
    records = []
    for case in setting.cases:
        by_name = dict(zip(models, samples[case], strict=True))
        records.append(case_record(case, by_name, geometries, element_bytes, machine, setting.rounds, tensor_bytes))
    return {
        "cases": records,
        "models": {
            name: describe_model(Path(model["model"]), geometries[name], element_bytes)
            for name, model in models.items()
        },
        **setting.describe(dtype),
        "machine": machine,
    }


def trust(dense_dir: Path, **settings) -> dict:
    """Times a model against itself and returns what null_test.json holds, less the command."""
    setting = Setting(**settings)
    (dense,) = read_models({"--dense": dense_dir}, setting.context_length, setting.load_format)

    def run(engines: list) -> dict:
        return measure_equal_and_slowed(engines, setting.cases, dense.vocab_size, setting.repeats)

    samples, dtype = run_in_rounds(setting, dense, [{"model": str(dense_dir)}] * 2, run)
    return {
        "cases": [
            verdict(case, samples["equal", case], samples["slowed", case], setting.rounds) for case in setting.cases
        ],
        "models": {"dense": describe_model(dense_dir, dense, dtype.itemsize)},
        **setting.describe(dtype),
    }


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench/e2e_speedup.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dense", type=Path, required=True, metavar="DIR", help="the model before pruning")
    add("--pruned", type=Path, metavar="DIR", help="what convert-pruned made of it; not with --null-test")
    add("--output-dir", type=Path, default=Path("results"), metavar="DIR", help="created; default: results")
    add_setting_arguments(parser, DEFAULT_CASES)
    add(
        "--rounds",
        type=positive_int,
        default=1,
        help="times that all engines are started, with --repeats each: engines of one model differ by a few percent, "
        "which the interval then covers; default: 1",
    )
    add(
        "--plugin-dense",
        action="store_true",
        help="time the dense model through the plugin's class, too: what of a gain is not pruning; a third engine",
    )
    add("--null-test", action="store_true", help="can this machine be trusted? --dense against itself, then slowed")
    return parser


def main() -> int:
    parser = build_parser()
    args = parser.parse_args()
    if args.null_test == bool(args.pruned):
        parser.error("give either --pruned or --null-test")
    if args.null_test and args.plugin_dense:
        parser.error("--plugin-dense does not go with --null-test")
    return run_command("e2e_speedup", lambda: (_run_null_test if args.null_test else _run)(args))


def _run(args: argparse.Namespace) -> None:
    from rich.console import Console

    from bench.report.reports import report_beside
    from bench.speed.report import machine_table, models_table, plot_speedups, results_table

    results = compare(
        args.dense, args.pruned, plugin_dense=args.plugin_dense, rounds=args.rounds, **chosen_settings(args)
    )
    results["command"] = _command()
    console = Console()
    console.print(models_table(results["models"]), results_table(results["cases"]), machine_table(results))
    for warning in named_warnings(results["cases"]):
        console.print(warning)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    json_path, plot_path = (args.output_dir / f"e2e_speedup.{suffix}" for suffix in ("json", "png"))
    write_json(json_path, results)
    plot_speedups(results["cases"], plot_path)
    console.print(f"written: {', '.join(map(str, [json_path, plot_path, *report_beside(json_path)]))}")


def _run_null_test(args: argparse.Namespace) -> None:
    """Writes null_test.json. Raises InputError when the machine does not pass."""
    results = trust(args.dense, rounds=args.rounds, **chosen_settings(args))
    results["command"] = _command()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path = args.output_dir / "null_test.json"
    write_json(path, results)
    for record in results["cases"]:
        print(f"{record['name']}: the same {shown(record['equal'])}, 10 % slower {shown(record['slowed'])}")
    print(f"written: {path}")
    problems = [f"{record['name']}: {problem}" for record in results["cases"] for problem in record["problems"]]
    if problems:
        raise InputError("This machine does not pass the null test:", problems)
    print("passed: equal engines come out as equal, and one that is 10 % slower as slower")


def _command() -> str:
    return shlex.join(["python", "bench/e2e_speedup.py", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
