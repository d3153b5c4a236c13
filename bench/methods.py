"""What the methods cost and keep: perplexity on held-out text of pico models that each of them has pruned.

    python -m bench.methods table --output-dir bench/results/methods               # make methods
    python -m bench.methods ablations --output-dir bench/results/method_ablations  # make ablations; three seeds

`table` compares methods at 20 and 50 % on the pico Llama, Qwen3 and Qwen3-MoE (bench/pico.py). `ablations` asks whether
the papers' orderings hold: DDP's gates, distillation and budgets, Tyr's search and error accumulation.

Every figure comes from one `learn-masks` command in a process of one thread, as many at a time as there are cores: a
pico model gains nothing from a second thread. `learning.json` of each run is in the results. With `--only`, other runs
that the directory holds stay in it if their options are those of today, and dense models and libraries the same.
Nothing checks whether the learner's code has changed since; if it has, measure everything anew.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import mean, pstdev

from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from pruned_vllm.common.arguments import positive_int
from pruned_vllm.common.command import run_command
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import read_json, write_json

RESULTS_FILE = "methods.json"
MODELS = ("llama", "qwen3", "qwen3_moe")
SPARSITIES = (0.2, 0.5)
TRAINING = ("--steps", "300", "--batch-size", "8", "--sequence-length", "128")
# The paper takes 1000 steps. To meet DDP's budget within 300, its multiplier must grow faster.
DDP = ("--method", "ddp", *TRAINING, "--lambda2-learning-rate", "1.6")
CALIBRATION = ("--calibration-sequences", "128", "--sequence-length", "128")
TYR = (
    *("--method", "tyr", *CALIBRATION),
    *("--iterations", "3", "--generations", "12", "--offspring", "16", "--selection-tokens", "8192"),
)
# name -> options of learn-masks
METHODS = {
    "random": ("--method", "random"),
    "magnitude": ("--method", "magnitude"),
    "wanda": ("--method", "wanda", *CALIBRATION),
    "maskprune": ("--method", "maskprune", *TRAINING),
    "tyr": TYR,
    "ddp": DDP,
}
GATES = {
    "hard-concrete": (*DDP, "--gate", "hard-concrete", "--kd-weight", "0"),
    "deterministic hard-concrete": (*DDP, "--gate", "deterministic-hard-concrete", "--kd-weight", "0"),
    "+ expanded masks": (*DDP, "--kd-weight", "0"),
    "+ distillation (ddp)": DDP,
}
# question -> (model, sparsity, {answer: options}), answers from the one expected to be worst to the best
ABLATIONS = {
    "gate and distillation": ("llama", 0.5, GATES),
    # Masks move as far in 300 steps as in the paper's 1000 at 0.02. Bounded masks need that most to reach 0 or 1.
    "gate and distillation, learning rate 0.08": (
        "llama",
        0.5,
        {answer: (*options, "--learning-rate", "0.08") for answer, options in GATES.items()},
    ),
    "budget": (
        "qwen3_moe",
        0.5,
        {
            "of each expert": (*DDP, "--head-sparsity", "0", "--budget", "expert"),
            "of each layer": (*DDP, "--head-sparsity", "0", "--budget", "layer"),
            "global": (*DDP, "--head-sparsity", "0"),
        },
    ),
    "search": (
        "llama",
        0.5,
        {
            "uniform sparsity": (*TYR, "--iterations", "0"),
            "search without error accumulation": (*TYR, "--error-accumulation", "none"),
            "search (tyr)": TYR,
        },
    ),
}
console = Console(highlight=False)


@dataclass(frozen=True)
class Run:
    """One learn-masks command."""

    question: str
    answer: str
    model: str
    sparsity: float
    seed: int
    options: tuple[str, ...]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.methods", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("table", "ablations"))
    parser.add_argument(
        "--output-dir", type=Path, required=True, help=f"gets {RESULTS_FILE}, in place of an earlier one"
    )
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="default: 42, or 42 43 44 for ablations")
    parser.add_argument("--jobs", type=positive_int, default=os.cpu_count(), help="runs at a time; default: all cores")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="methods, or questions and answers; default: all")
    args = parser.parse_args(argv)

    def run() -> None:
        path = args.output_dir / RESULTS_FILE
        before = read_json(path) if args.only and path.is_file() else None
        args.output_dir.mkdir(parents=True, exist_ok=True)  # now, not after hours of learning
        seeds = args.seeds or ((42,) if args.what == "table" else (42, 43, 44))
        results = measure(_runs(args.what, seeds, args.only), args.jobs)
        if before:
            results = with_others(results, before, _runs(args.what, seeds))
        write_json(path, results)
        show(results)

    return run_command(parser.prog, run)


def _runs(what: str, seeds: tuple[int, ...], only: list[str] | None = None) -> list[Run]:
    names = METHODS if what == "table" else _questions_and_answers()
    if unknown := sorted(set(only or ()) - set(names)):
        raise InputError(f"{', '.join(unknown)}: there are {', '.join(names)}")
    if what == "ablations":
        return [
            Run(question, answer, model, sparsity, seed, options)
            for question, (model, sparsity, answers) in ABLATIONS.items()
            for answer, options in answers.items()
            if not only or question in only or answer in only
            for seed in seeds
        ]
    return [
        Run(f"{model} {sparsity:.0%}", name, model, sparsity, seed, options)
        for model in MODELS
        for sparsity in SPARSITIES
        for name, options in METHODS.items()
        if not only or name in only
        for seed in seeds
    ]


def _questions_and_answers() -> list[str]:
    return [name for question, (*_, answers) in ABLATIONS.items() for name in (question, *answers)]


def measure(runs: list[Run], jobs: int) -> dict:
    """Runs all and returns what RESULTS_FILE holds."""
    from bench.pico import pico_model

    models = {run.model: pico_model(run.model) for run in runs}
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(jobs) as pool:
        numbered = [(Path(temporary) / str(number), run) for number, run in enumerate(runs)]
        outcomes = pool.map(lambda task: learn_one(models[task[1].model], task[1], task[0]), numbered)
        results = list(tqdm(outcomes, total=len(runs), desc="methods", unit="run"))
    return {
        "models": {name: read_json(directory / "pico.json") for name, directory in models.items()},
        "runs": results,
        "jobs": jobs,
        "versions": {
            "python": platform.python_version(),
            **{library: version(library) for library in ("torch", "transformers")},
        },
    }


def with_others(results: dict, before: dict, planned: list[Run]) -> dict:
    """`results`, and those runs of `before` whose question or answer they lack, in the order of `planned`.

    Runs that are planned with other options by now, or that read another dense model or used other libraries, go.
    """
    order = {(run.question, run.answer, run.model, run.sparsity, run.options): i for i, run in enumerate(planned)}
    dense = {run["model"]: run["dense_perplexity"] for run in before["runs"] + results["runs"]}

    def identity(run: dict) -> tuple:
        return run["question"], run["answer"], run["model"], run["sparsity"], tuple(run["options"])

    measured = {(run["question"], run["answer"]) for run in results["runs"]}
    others = [
        run
        for run in before["runs"]
        if (run["question"], run["answer"]) not in measured
        and identity(run) in order
        and before["versions"] == results["versions"]
        and run["dense_perplexity"] == dense[run["model"]]
    ]
    models = {run["model"]: before["models"][run["model"]] for run in others} | results["models"]
    return results | {"models": models, "runs": sorted(others + results["runs"], key=lambda run: order[identity(run)])}


def learn_one(model: Path, run: Run, checkpoint: Path) -> dict:
    """Runs one command; raises InputError when it fails."""
    arguments = [str(model), str(checkpoint), "--sparsity", str(run.sparsity), "--seed", str(run.seed)]
    heldout = ["--eval-data", str(model / "heldout.txt"), "--agreement-prompts", "0"]
    arguments += ["--device", "cpu", *heldout, *run.options]
    if run.options[1] not in ("random", "magnitude"):
        arguments += ["--data", str(model / "train.txt")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "learner.cli", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise InputError(
            f"learn-masks {' '.join(arguments)} ended with exit code {done.returncode}:\n{done.stderr[-2000:]}"
        )
    return {
        "question": run.question,
        "answer": run.answer,
        "model": run.model,
        "sparsity": run.sparsity,
        "seed": run.seed,
        "options": list(run.options),
        **read_json(checkpoint / "learning.json")["results"],
    }


def show(results: dict) -> None:
    """A table for each question: mean perplexity over seeds, its spread, what was removed, seconds."""
    for question in dict.fromkeys(run["question"] for run in results["runs"]):
        runs = [run for run in results["runs"] if run["question"] == question]
        title = f"{question} ({runs[0]['model']}, dense perplexity {runs[0]['dense_perplexity']:.2f})"
        table = Table("", "perplexity", "spread", "heads", "channels", "seconds", box=box.SIMPLE, title=title)
        for answer in dict.fromkeys(run["answer"] for run in runs):
            same_answer = [run for run in runs if run["answer"] == answer]
            perplexities = [run["masked_perplexity"] for run in same_answer]
            removed = [
                [run[f"{kind}_sparsity"] for run in same_answer for kind in kinds if f"{kind}_sparsity" in run]
                for kinds in (("head",), ("channel", "expert"))
            ]
            table.add_row(
                answer,
                f"{mean(perplexities):.2f}",
                f"{pstdev(perplexities):.2f}" if len(same_answer) > 1 else "",
                *(f"{mean(shares):.1%}" if shares else "" for shares in removed),
                f"{mean(run['learning_seconds'] for run in same_answer):.0f}",
            )
        console.print(table)


if __name__ == "__main__":
    sys.exit(main())
