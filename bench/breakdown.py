"""Where the time of a step goes, dense against pruned, on real vLLM: which cost keeps a speedup from the ideal one.

    python -m bench.breakdown --dense MODEL --pruned out/
    python -m bench.breakdown --dense scaled/dense --pruned scaled/pruned --load-format dummy --eager

Prints a table for each case and writes breakdown.json to --output-dir. Columns are milliseconds of a step:

- dense, pruned, and with --plugin-dense the dense model through the plugin's class
- narrow: a model of as many layers with hidden size 64, one head, 64 channels: what does not depend on widths
- lost: pruned less dense / ideal. All parts together are what the pruned model's step lacks to the ideal
- fixed: how much of that is lost since narrow's time does not shrink, narrow * (1 - 1 / ideal)

The parts of a step add up to it, since three of them are what is left: "scheduler, messages" is the engine's step
without its worker, "rest of the worker" is the worker's time without the phases that are timed, and "Python and
dispatch" the forward pass and the logits without operators. All but operators come from runs without a profiler;
operators come from torch's, which makes small ones about a microsecond longer. Of --repeats runs of either kind the
fastest counts. Where Python and dispatch come out below 0, that much is unexplained: then something else disturbed
the machine. Compiled models are compiled with inductor's kernel profiling on.

On a GPU, with --eager only, operators count with their time on the GPU, and every phase waits for the GPU. That has not
been run.
"""

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from bench.speed.engines import random_prompts, running_engines, through_plugin, time_case
from bench.speed.profile import LOGITS, OTHER, PARTS
from bench.speed.results import describe_model
from bench.speed.setting import Setting, add_setting_arguments, chosen_settings, read_models
from pruned_vllm.common.command import run_command
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import read_json, write_json
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.ideal import Case, ideal_speedup

DEFAULT_CASES = ("decode:1:32:64", "prefill:1:512")
ENGINE, PYTHON = "scheduler, messages", "Python and dispatch"
WORKER_PHASES = ("input preparation", "attention metadata", "sampler", "rest of the worker")
Run = tuple[float, list[dict]]  # seconds, as the engine times them, and the worker's records of the steps
ROWS = (*PARTS, OTHER, PYTHON, *WORKER_PHASES, ENGINE)
NARROW = 64  # hidden size and channels of the narrow model


def narrow_config(config: Mapping[str, Any]) -> dict:
    """The dense config.json with as many layers and experts, but of the least width."""
    experts = ModelGeometry.from_config(config).family.experts
    widths = {"intermediate_size", *filter(None, (experts.width_key, experts.shared_width_key) if experts else ())}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": ModelGeometry.from_config(config).head_dim}
    return {**config, "hidden_size": NARROW, **dict.fromkeys(widths, NARROW), **heads}


def break_down(dense_dir: Path, pruned_dir: Path, *, plugin_dense: bool = False, **settings) -> dict:
    """Runs the cases and returns what breakdown.json holds, less the command; `settings` are those of `Setting`."""
    setting = Setting(**settings)
    directories = {"--dense": dense_dir, "--pruned": pruned_dir}
    dense, pruned = read_models(directories, setting.context_length, setting.load_format)
    models: dict[str, dict] = {"dense": {"model": str(dense_dir)}, "pruned": {"model": str(pruned_dir)}}
    if plugin_dense:
        models["plugin_dense"] = models["dense"] | through_plugin(dense)
    _check_platform(setting)
    _profile_compiled_kernels()
    with tempfile.TemporaryDirectory() as narrow:
        write_json(Path(narrow) / "config.json", narrow_config(read_json(dense_dir / "config.json")))
        models["narrow"] = {"model": narrow, "load_format": "dummy"}
        with running_engines(setting.engine_options(dense, list(models.values()))) as engines:
            dtype = engines[0].model_config.dtype
            named = dict(zip(models, engines, strict=True))
            records = [
                case_record(
                    case,
                    record_case(named, case, dense.vocab_size, setting.repeats),
                    ideal_speedup(dense, pruned, case, dtype.itemsize),
                )
                for case in setting.cases
            ]
    geometries = {"dense": dense, "pruned": pruned}
    return {
        "cases": records,
        "models": {
            name: describe_model(directories[f"--{name}"], geometry, dtype.itemsize)
            for name, geometry in geometries.items()
        },
        **setting.describe(dtype),
    }


def _profile_compiled_kernels() -> None:
    """Kernels that inductor compiles appear in profiles only if it was told so before. The variable is for processes
    to come: this one has read it already. vLLM's cache does not know of it, and returns what was compiled without."""
    from torch._inductor import config

    config.cpp.enable_kernel_profile = True
    os.environ |= {"TORCHINDUCTOR_CPP_ENABLE_KERNEL_PROFILE": "1", "VLLM_DISABLE_COMPILE_CACHE": "1"}


def _check_platform(setting: Setting) -> None:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() and setting.compile:
        raise InputError("On a GPU, a compiled step is one CUDA graph, which has no parts: choose --eager")


def record_case(engines: Mapping[str, Any], case: Case, vocab_size: int, repeats: int) -> dict[str, dict]:
    """Times and profiles a case on all engines, in turns; by name see `contestant_record`."""
    prompts = random_prompts(case, vocab_size)
    runs: dict[str, list[Run]] = {name: [] for name in engines}
    profiled: dict[str, list[Run]] = {name: [] for name in engines}
    for repeat in range(-1, repeats):  # -1 warms up
        for name in list(engines)[:: -1 if repeat % 2 else 1]:
            found = [_record(engines[name], case, prompts, profile) for profile in (False, True)]
            if repeat >= 0:
                runs[name].append(found[0])
                profiled[name].append(found[1])
    return {name: contestant_record(case, runs[name], profiled[name]) for name in engines}


def _record(engine: Any, case: Case, prompts: list[dict], profile: bool) -> Run:
    """Seconds of a run, as the engine times it, and the worker's records of the steps that were timed."""
    first = 1 if case.kind == "decode" else 0  # before decode steps there is one that prefills
    engine.collective_rpc("probe_record", args=(profile, first))
    try:
        seconds = time_case(engine, case, prompts)
    finally:
        (steps, *_) = engine.collective_rpc("probe_steps")
    return seconds, [step for step in steps if step["tokens"]][first:]


def contestant_record(case: Case, runs: Sequence[Run], profiled_runs: Sequence[Run]) -> dict:
    """What breakdown.json holds of a contestant: seconds of a step and its parts, which add up to it.

    The parts are those of the fastest run without profiler, their operators those of the fastest run with it, of the
    steps that have "ops": parts of different runs belong together only where nothing else disturbed either.
    """
    seconds, steps = min(runs, key=lambda run: run[0])
    step_s = seconds / case.num_steps
    phases = mean_of([step["phases"] for step in steps])
    profiled = [step for step in min(profiled_runs, key=lambda run: run[0])[1] if "ops" in step]
    operators = {part: operators_of(part, profiled) for part in (*PARTS, OTHER)}
    parts = {part: sum(seconds.values()) for part, seconds in operators.items()}
    computed = phases.get("forward", 0.0) + phases.get(LOGITS, 0.0)
    parts[PYTHON] = computed - sum(parts.values())
    parts |= {phase: phases.get(phase, 0.0) for phase in WORKER_PHASES}
    parts[ENGINE] = step_s - sum(phases.values())
    slow = mean_of([step["phases"] for step in profiled])
    return {
        "step_s": step_s,
        "samples_s": [run_seconds / case.num_steps for run_seconds, _ in runs],
        "parts_s": parts,
        "operators_s": {part: seconds for part, seconds in operators.items() if seconds},
        "profiled_forward_over_timed": (slow.get("forward", 0.0) + slow.get(LOGITS, 0.0)) / computed,
    }


def operators_of(part: str, steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of a step by operator of this part, the slowest first."""
    inside = [mean_of([step["ops"].get(phase, {}).get(part, {}) for step in steps]) for phase in ("forward", LOGITS)]
    seconds = {name: sum(phase.get(name, 0.0) for phase in inside) for phase in inside for name in phase}
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def mean_of(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each key, absent ones taken as 0."""
    keys = {key for record in records for key in record}
    return {key: fmean(record.get(key, 0.0) for record in records) for key in keys}


def case_record(case: Case, contestants: Mapping[str, Mapping], ideal: float) -> dict:
    """What breakdown.json holds of a case."""
    dense, pruned, narrow = (contestants[name] for name in ("dense", "pruned", "narrow"))
    speedup = dense["step_s"] / pruned["step_s"]
    return {
        "name": case.name,
        "ideal_speedup": ideal,
        "speedup": speedup,
        "of_ideal": speedup / ideal,
        "contestants": dict(contestants),
        "lost_s": {row: pruned["parts_s"][row] - dense["parts_s"][row] / ideal for row in ROWS},
        "fixed_s": {row: narrow["parts_s"][row] * (1 - 1 / ideal) for row in ROWS},
    }


def table(record: Mapping[str, Any]):
    """A case as a table for the terminal, in milliseconds."""
    from rich import box
    from rich.table import Table

    contestants = record["contestants"]
    shown = Table(box=box.SIMPLE, padding=0, title=f"{record['name']}, milliseconds of a step")
    shown.add_column("", no_wrap=True)
    for header in (*(name.replace("_", "\n") for name in contestants), "lost", "fixed"):
        shown.add_column(header, justify="right", no_wrap=True)

    def add(name: str, *seconds: float) -> None:
        shown.add_row(name, *(f"{1e3 * value:.3f}" for value in seconds))

    for row in ROWS:
        values = [contestant["parts_s"][row] for contestant in contestants.values()]
        if any(values):
            add(row, *values, record["lost_s"][row], record["fixed_s"][row])
    shown.add_section()
    sums = [sum(record[column].values()) for column in ("lost_s", "fixed_s")]
    add("step", *(contestant["step_s"] for contestant in contestants.values()), *sums)
    return shown


def verdict(record: Mapping[str, Any]) -> str:
    """A sentence: what the speedup is, and which parts keep it from the ideal one, largest first."""
    lost = sorted(record["lost_s"].items(), key=lambda item: -item[1])
    total = sum(record["lost_s"].values())
    text = f"{record['name']}: {record['speedup']:.2f}x, {record['of_ideal']:.2f} of {record['ideal_speedup']:.2f}x"
    if total <= 0:
        return f"{text}; nothing is lost"
    named = [f"{part} {1e3 * seconds:.2f}" for part, seconds in lost[:4] if seconds > 0.02 * total]
    fixed = sum(record["fixed_s"].values())
    return (
        f"{text}; {1e3 * total:.2f} ms a step are lost, {1e3 * fixed:.2f} to costs that do not depend on widths: "
        + ", ".join(named)
    )


def notes(record: Mapping[str, Any]) -> list[str]:
    """What weakens a case: operators that took longer under the profiler than the whole forward pass without."""
    found = []
    for name, contestant in record["contestants"].items():
        if (unexplained := contestant["parts_s"][PYTHON]) < 0:
            share = -unexplained / contestant["step_s"]
            found.append(f"{record['name']}, {name}: {share:.1%} of the step unexplained, by the profiler's own time")
        noise = max(contestant["samples_s"]) / median(contestant["samples_s"]) - 1
        if noise > 0.1:
            found.append(f"{record['name']}, {name}: steps of one run took {noise:.0%} longer; use a quieter machine")
    return found


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.breakdown", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dense", type=Path, required=True, metavar="DIR", help="the model before pruning")
    add("--pruned", type=Path, required=True, metavar="DIR", help="what convert-pruned made of it")
    add_setting_arguments(parser, DEFAULT_CASES)
    add("--plugin-dense", action="store_true", help="the dense model through the plugin's class, too; a fourth engine")
    add("--output-dir", type=Path, default=Path("results"), metavar="DIR", help="created; default: results")
    return parser


def _run(args: argparse.Namespace) -> None:
    from rich.console import Console

    results = break_down(args.dense, args.pruned, plugin_dense=args.plugin_dense, **chosen_settings(args))
    results["command"] = shlex.join(["python", "-m", "bench.breakdown", *sys.argv[1:]])
    console = Console(highlight=False)
    for record in results["cases"]:
        console.print(table(record), verdict(record), *notes(record), sep="\n")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path = args.output_dir / "breakdown.json"
    write_json(path, results)
    console.print(f"written: {path}")


def main() -> int:
    args = build_parser().parse_args()
    return run_command("bench.breakdown", lambda: _run(args))


if __name__ == "__main__":
    sys.exit(main())
