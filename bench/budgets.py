"""How short a run may be and still meet its budget by learning, and what one budget for all kinds of units is worth.

    python -m bench.budgets met llama --output-dir bench/results/budgets    # budgets and lengths of runs
    python -m bench.budgets joint llama --output-dir bench/results/budgets  # --target-bytes against --sparsity

On a pico model (bench/pico.py), in one thread, which is all that it can use. `met` asks for one half of the units
(--sparsity), and for the bytes and the ideal speedup that this comes to in all layers alike. It records how far units
that count (a score of 1/2 or more) were above DDP's budget, as a share of what all units come to: before masks begin
to fade, which is what the penalty alone has learned, and just before units are fixed, which is what is cut off by
force. `--settle 0` is the paper's schedule, in which nothing fades.

`joint` compares --sparsity with --target-bytes of as many bytes at two sizes and with three seeds; of a pico model by
DDP, and of a real one, given as a directory, by scores, which take minutes each and not the better part of an hour.
Seeds then choose the calibration text:

    python -m bench.budgets joint MODEL --methods taylor flap --data train.txt --eval-data heldout.txt --output-dir out
"""

import argparse
import csv
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bench.pico import RECIPES
from pruned_vllm.common.command import run_command
from pruned_vllm.common.environment import library_versions
from pruned_vllm.common.files import read_json, write_json
from pruned_vllm.formats.fingerprint import Fingerprint

AT = "decode:8:32:64"
BATCH = {"batch_size": 2, "sequence_length": 64}
CALIBRATION = {"calibration_sequences": 128, "sequence_length": 128}
SCORES = ("flap", "taylor")  # others take the same share of every kind for a cost, too
DDP_STEPS, JOINT_STEPS = (50, 300, 1000), 300
SEEDS = (42, 43, 44)
SPARSITIES = (0.2, 0.5)
console = Console(highlight=False)


@dataclass(frozen=True)
class Run:
    """One run of learn-masks.

    Attributes:
        measure, asked: of the target: sparsity, bytes or speedup.
        settings: of the method, where they are not its defaults.
    """

    method: str
    measure: str
    asked: float
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int = SEEDS[0]


@dataclass(frozen=True)
class Subject:
    """A model that is learned on, its texts, and what the results say about it."""

    model: Path
    data: list[str]
    eval_data: list[str]
    about: dict


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.budgets", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("met", "joint"))
    parser.add_argument("model", help=f"{', '.join(RECIPES)}, or for joint a directory")
    parser.add_argument("--methods", nargs="+", choices=("ddp", *SCORES), default=[], help="of joint; default: ddp")
    parser.add_argument(
        "--sparsity", nargs="+", type=float, default=[], metavar="S", help=f"of joint; default: {SPARSITIES}"
    )
    parser.add_argument("--data", nargs="+", default=[], help="text to learn from; pico models have their own")
    parser.add_argument("--eval-data", nargs="+", default=[], help="held-out text, likewise")
    parser.add_argument(
        "--output-dir", type=Path, required=True, help="gets WHAT_MODEL.json, in place of an earlier one"
    )
    args = parser.parse_args(argv)
    is_pico = args.model in RECIPES
    if not is_pico and (args.what == "met" or not args.data or not args.eval_data):
        parser.error(f"{args.model} is no pico model ({', '.join(RECIPES)}): choose joint, --data and --eval-data")
    if is_pico and (args.data or args.eval_data):
        parser.error(f"{args.model} has texts of its own: leave out --data and --eval-data")
    if args.what == "met" and (args.methods or args.sparsity):
        parser.error("--methods and --sparsity are for joint: met is about DDP's budgets of one half")
    methods, sparsities = args.methods or ["ddp"], args.sparsity or SPARSITIES
    command = shlex.join(["python", "-m", "bench.budgets", *(sys.argv[1:] if argv is None else argv)])

    def run() -> None:
        args.output_dir.mkdir(parents=True, exist_ok=True)  # now, not after minutes of learning
        subject = pico_subject(args.model) if is_pico else real_subject(args)
        facts = {"model": subject.about, "versions": library_versions(("torch", "transformers"))}
        runs: list[dict] = []
        for record in met(subject) if args.what == "met" else joint(subject, methods, sparsities):
            runs.append(record)
            results = {"command": command, "at": AT, "runs": runs, **facts}
            write_json(args.output_dir / f"{args.what}_{Path(args.model).name}.json", results)
        (show_met if args.what == "met" else show_joint)(runs)

    return run_command(parser.prog, run)


def pico_subject(name: str) -> Subject:
    """A pico model, trained now where it is not cached. One thread is all that it can use."""
    import torch

    from bench.pico import pico_model

    torch.set_num_threads(1)
    model = pico_model(name)
    return Subject(model, [str(model / "train.txt")], [str(model / "heldout.txt")], read_json(model / "pico.json"))


def real_subject(args: argparse.Namespace) -> Subject:
    model = Path(args.model)
    about = {"name": model.name, "fingerprint": str(Fingerprint.from_directory(model))}
    return Subject(model, args.data, args.eval_data, about)


def met(subject: Subject) -> Iterator[dict]:
    """Budgets in three measures, for runs of each length; the paper's schedule for one of them."""
    half = learn_one(subject, Run("magnitude", "sparsity", 0.5))
    runs = []
    for measure, asked in (("sparsity", 0.5), ("bytes", half["bytes"]), ("speedup", round(half["ideal_speedup"], 2))):
        runs += [Run("ddp", measure, asked, {"steps": steps, **BATCH}) for steps in DDP_STEPS]
        if measure == "sparsity":
            runs += [Run("ddp", measure, asked, {"steps": steps, **BATCH, "settle": 0.0}) for steps in DDP_STEPS]
    for run in runs:
        yield learn_one(subject, run)


def joint(subject: Subject, methods: Sequence[str], sparsities: Sequence[float]) -> Iterator[dict]:
    """Each method with a share for each kind of units, and with as many bytes for all of them together."""
    for method in methods:
        settings = {"steps": JOINT_STEPS, **BATCH} if method == "ddp" else CALIBRATION
        for sparsity in sparsities:
            for seed in SEEDS:
                separate = learn_one(subject, Run(method, "sparsity", sparsity, settings, seed))
                together = learn_one(subject, Run(method, "bytes", separate["bytes"], settings, seed))
                yield {"sparsity": sparsity, "seed": seed, "separate": separate, "joint": together}


def learn_one(subject: Subject, run: Run) -> dict:
    """What a run came to."""
    from learner.job import METHODS, Job
    from learner.learn import learn

    name = "sparsity" if run.measure == "sparsity" else f"target_{run.measure}"
    target: dict[str, Any] = {name: [run.asked]}
    job = Job(
        model=str(subject.model),
        method=run.method,
        settings=METHODS[run.method].settings(**run.settings),
        at=AT,
        data=subject.data,
        eval_data=subject.eval_data,
        agreement_prompts=0,
        device="cpu",
        seed=run.seed,
        **target,
    )
    with tempfile.TemporaryDirectory() as temporary:
        (results,) = learn(job, Path(temporary, "ckpt"))
        log = Path(temporary, "ckpt", "learning.csv")
        rows = list(csv.DictReader(log.read_text().splitlines())) if log.exists() else []
    record = {"method": run.method, "measure": run.measure, "asked": run.asked, "seed": run.seed, **run.settings}
    record |= {"of_budget": _of_budget(run, results), **results}
    if run.method == "ddp":
        record |= _over(job.settings, [float(row["over"]) for row in rows])
    console.print(run, {name: value for name, value in record.items() if name.startswith(("of_", "over_", "masked_"))})
    return record


def _over(settings: Any, over: list[float]) -> dict[str, float]:
    """How far the units that count are above the budget after the last step of learning, and of fading."""
    from learner.methods.stages import Stages

    moments = [Stages(settings.steps, [0.5], settings.settle).at(step) for step in range(settings.steps)]
    fading = [step for step, moment in enumerate(moments) if moment.share] or [settings.steps - 1]
    return {
        "settle": settings.settle,
        "over_before_fading": over[fading[0] - 1],
        "over_before_fixing": over[fading[-1] - 1],
    }


def _of_budget(run: Run, results: dict) -> float:
    """What is left over what may be left: of units, of the kind that is furthest off; of bytes; of the ideal time."""
    if run.measure == "bytes":
        return results["bytes"] / run.asked
    if run.measure == "speedup":
        return run.asked / results["ideal_speedup"]
    shares = [(1 - value) / (1 - run.asked) for name, value in results.items() if name.endswith("_sparsity")]
    return max(shares, key=lambda share: abs(share - 1))


def show_met(runs: Sequence[dict]) -> None:
    columns = ("", "asked", "steps", "over, fading", "over, fixing", "of budget", "perplexity", "seconds")
    table = Table(*columns, box=box.SIMPLE, title=f"dense perplexity {runs[0]['dense_perplexity']:.2f}")
    for run in runs:
        table.add_row(
            run["method"] + (", settle 0" if run.get("settle") == 0 else ""),
            f"{run['measure']} {run['asked']:g}",
            f"{run.get('steps', '')}",
            *(f"{run[key]:+.2%}" if key in run else "" for key in ("over_before_fading", "over_before_fixing")),
            f"{run['of_budget']:.4f}",
            f"{run['masked_perplexity']:.2f}",
            f"{run['learning_seconds']:.0f}",
        )
    console.print(table)


def compared(runs: Sequence[dict]) -> Iterator[tuple[str, float, list[dict], list[float], list[float], list[float]]]:
    """Of what `joint` recorded, for each method and sparsity: those runs, and of each seed the perplexity by separate
    budgets, by the joint one, and the second over the first."""
    for method, sparsity in dict.fromkeys((run["joint"]["method"], run["sparsity"]) for run in runs):
        same = [run for run in runs if (run["joint"]["method"], run["sparsity"]) == (method, sparsity)]
        before, after = ([run[name]["masked_perplexity"] for run in same] for name in ("separate", "joint"))
        yield method, sparsity, same, before, after, [new / old for old, new in zip(before, after, strict=True)]


def show_joint(runs: Sequence[dict]) -> None:
    table = Table("", "sparsity", "bytes", "separate", "joint", "joint / separate", "of each seed", box=box.SIMPLE)
    for method, sparsity, same, before, after, gains in compared(runs):
        table.add_row(
            method,
            f"{sparsity:.0%}",
            f"{mean(run['joint']['bytes'] for run in same):,.0f}",
            f"{mean(before):.2f}",
            f"{mean(after):.2f}",
            f"{mean(gains):.3f}",
            " ".join(f"{gain:.3f}" for gain in gains),
        )
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
