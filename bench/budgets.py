"""How short a run may be and still meet its budget by learning, and what one budget for all kinds of units is worth.

    python -m bench.budgets met --output-dir bench/results/budgets      # budgets and lengths of runs
    python -m bench.budgets joint --output-dir bench/results/budgets    # --target-bytes against --sparsity

On the pico Llama and Qwen3-MoE (bench/pico.py). `met` asks for one half of the units (--sparsity), and for the bytes
and the ideal speedup that this comes to in all layers alike. For DDP it records how far the units that count were above
the budget just before units are fixed (`over`, of what all units come to): so much is then cut off by force, whether
they were learned away or not. `--settle 0` is the paper's schedule. MaskPrune's `cut` is the share that is cut off of
the sum of all masks of a row; Tyr has no steps.
"""

import argparse
import csv
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from bench.methods import learn_masks
from learner.job import DDPSettings
from learner.methods.stages import Stages
from pruned_vllm.common.arguments import positive_int
from pruned_vllm.common.command import run_command
from pruned_vllm.common.environment import library_versions
from pruned_vllm.common.files import read_json, write_json

MODELS = ("llama", "qwen3_moe")
AT = "decode:8:32:64"
STEPS = {"ddp": (50, 300, 1000), "maskprune": (50, 300)}
SEEDS = (42, 43, 44)
SPARSITIES = (0.2, 0.5)
BATCH = ("--batch-size", "4", "--sequence-length", "64")
TYR = (
    *("--method", "tyr", "--calibration-sequences", "64", "--sequence-length", "64"),
    *("--generations", "4", "--offspring", "8", "--selection-tokens", "4096"),
)
console = Console(highlight=False)


@dataclass(frozen=True)
class Run:
    """One learn-masks command.

    Attributes:
        answer: what it is called in the table.
        measure, asked: of the target: sparsity, bytes or speedup.
        steps, settle: None where the method has none.
    """

    model: str
    answer: str
    measure: str
    asked: float
    options: tuple[str, ...]
    seed: int = SEEDS[0]
    steps: int | None = None
    settle: float | None = None

    @property
    def arguments(self) -> list[str]:
        target = "--sparsity" if self.measure == "sparsity" else f"--target-{self.measure}"
        number = f"{self.asked:.0f}" if self.measure == "bytes" else f"{self.asked}"
        return [target, number, "--at", AT, "--seed", str(self.seed), *self.options]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.budgets", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("met", "joint"))
    parser.add_argument("--output-dir", type=Path, required=True, help="gets met.json or joint.json")
    parser.add_argument("--jobs", type=positive_int, default=os.cpu_count(), help="runs at a time; default: all cores")
    args = parser.parse_args(argv)
    command = shlex.join(["python", "-m", "bench.budgets", *(sys.argv[1:] if argv is None else argv)])

    def run() -> None:
        from bench.pico import pico_model

        args.output_dir.mkdir(parents=True, exist_ok=True)  # now, not after minutes of learning
        models = {name: pico_model(name) for name in MODELS}
        measured = met(models, args.jobs) if args.what == "met" else joint(models, args.jobs)
        facts = {name: read_json(directory / "pico.json") for name, directory in models.items()}
        results = {
            "command": command,
            "at": AT,
            "models": facts,
            "runs": measured,
            "versions": library_versions(("torch", "transformers")),
        }
        write_json(args.output_dir / f"{args.what}.json", results)
        (show_met if args.what == "met" else show_joint)(measured)

    return run_command(parser.prog, run)


def met(models: dict[str, Path], jobs: int) -> list[dict]:
    """Budgets in three measures, for runs of each length; the paper's schedule and other methods for some of them."""
    half = [Run(name, "magnitude", "sparsity", 0.5, ("--method", "magnitude")) for name in MODELS]
    runs = []
    for found in measure(models, half, jobs):
        targets = {"sparsity": 0.5, "bytes": found["bytes"], "speedup": round(found["ideal_speedup"], 2)}
        for name, asked in targets.items():
            target = (found["model"], name, asked)
            runs += [_ddp(target, steps) for steps in STEPS["ddp"]]
            if name == "sparsity":
                runs += [_ddp(target, steps, settle=0.0) for steps in STEPS["ddp"]]
            if name != "speedup":
                runs += [_maskprune(target, steps) for steps in STEPS["maskprune"]]
                runs.append(_run(target, "tyr", TYR))
    return measure(models, runs, jobs)


Target = tuple[str, str, float]  # model, measure, asked


def _ddp(target: Target, steps: int, settle: float = DDPSettings.settle) -> Run:
    options = ("--method", "ddp", "--steps", str(steps), *BATCH, "--settle", str(settle))
    return _run(target, "ddp" if settle else "ddp, as the paper", options, steps, settle)


def _maskprune(target: Target, steps: int) -> Run:
    return _run(target, "maskprune", ("--method", "maskprune", "--steps", str(steps), *BATCH), steps)


def _run(
    target: Target, answer: str, options: tuple[str, ...], steps: int | None = None, settle: float | None = None
) -> Run:
    model, measure, asked = target
    return Run(model, answer, measure, asked, options, steps=steps, settle=settle)


def joint(models: dict[str, Path], jobs: int) -> list[dict]:
    """DDP with a share for each kind of units, and with as many bytes for all of them together."""
    options = ("--method", "ddp", "--steps", "300", *BATCH)
    separate = [
        Run(name, "separate", "sparsity", sparsity, options, seed, 300)
        for name in MODELS
        for sparsity in SPARSITIES
        for seed in SEEDS
    ]
    found = measure(models, separate, jobs)
    together = [
        Run(run.model, "joint", "bytes", result["bytes"], options, run.seed, 300)
        for run, result in zip(separate, found, strict=True)
    ]
    return [
        {**result, "of_sparsity": run.asked}
        for run, result in zip(separate * 2, found + measure(models, together, jobs), strict=True)
    ]


def measure(models: dict[str, Path], runs: Sequence[Run], jobs: int) -> list[dict]:
    """Runs all, `jobs` at a time, the longest first; results in the order of `runs`."""
    order = sorted(range(len(runs)), key=lambda index: -(runs[index].steps or 0))
    found: dict[int, dict] = {}
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(jobs) as pool:
        outcomes = pool.map(lambda index: learn_one(models, runs[index], Path(temporary, str(index))), order)
        found = dict(zip(order, tqdm(outcomes, total=len(runs), desc="budgets", unit="run"), strict=True))
    return [found[index] for index in range(len(runs))]


def learn_one(models: dict[str, Path], run: Run, checkpoint: Path) -> dict:
    results = learn_masks(models[run.model], checkpoint, run.arguments)
    record = {**asdict(run), **results, "of_budget": _of_budget(run, results)}
    if run.steps is None:
        return record
    with (checkpoint / "learning.csv").open() as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    if run.settle is not None:
        moments = [Stages(run.steps, [0.5], run.settle).at(step) for step in range(run.steps)]
        fixing = next((step for step, moment in enumerate(moments) if moment.fading == 0), run.steps - 1)
        fading = next((step for step, moment in enumerate(moments) if moment.share), fixing)
        record |= {"over_before_fading": rows[fading - 1]["over"], "over_before_fixing": rows[fixing - 1]["over"]}
    record |= {name: value for name, value in rows[-1].items() if name.endswith("_cut")}
    return record


def _of_budget(run: Run, results: dict) -> float:
    """What is left over what may be left: of units, of the kind that is furthest off; of bytes; of the ideal time."""
    if run.measure == "bytes":
        return results["bytes"] / run.asked
    if run.measure == "speedup":
        return run.asked / results["ideal_speedup"]
    shares = [(1 - value) / (1 - run.asked) for name, value in results.items() if name.endswith("_sparsity")]
    return max(shares, key=lambda share: abs(share - 1))


def show_met(runs: Sequence[dict]) -> None:
    for model in MODELS:
        dense = next(run["dense_perplexity"] for run in runs if run["model"] == model)
        columns = ("", "asked", "steps", "over, fading", "over, fixing", "cut", "of budget", "perplexity", "seconds")
        table = Table(*columns, box=box.SIMPLE, title=f"{model}, dense perplexity {dense:.2f}")
        for run in (run for run in runs if run["model"] == model):
            cuts = [f"{value:.2%}" for name, value in run.items() if name.endswith("_cut")]
            over = [f"{run[key]:+.2%}" if key in run else "" for key in ("over_before_fading", "over_before_fixing")]
            table.add_row(
                run["answer"],
                f"{run['measure']} {run['asked']:g}",
                f"{run['steps'] or ''}",
                *over,
                " ".join(cuts),
                f"{run['of_budget']:.4f}",
                f"{run['masked_perplexity']:.2f}",
                f"{run['learning_seconds']:.0f}",
            )
        console.print(table)


def show_joint(runs: Sequence[dict]) -> None:
    table = Table("", "of sparsity", "bytes", "separate", "joint", "joint / separate", "of each seed", box=box.SIMPLE)
    for model in MODELS:
        for sparsity in SPARSITIES:
            same = [run for run in runs if (run["model"], run["of_sparsity"]) == (model, sparsity)]
            by_answer = {answer: [run for run in same if run["answer"] == answer] for answer in ("separate", "joint")}
            before, after = ([run["masked_perplexity"] for run in found] for found in by_answer.values())
            gains = [new / old for old, new in zip(before, after, strict=True)]
            table.add_row(
                model,
                f"{sparsity:.0%}",
                f"{mean(run['bytes'] for run in same):,.0f}",
                f"{mean(before):.2f}",
                f"{mean(after):.2f}",
                f"{mean(gains):.3f}",
                " ".join(f"{gain:.3f}" for gain in gains),
            )
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
