"""Prunes a real pretrained model with every method, recovers the best, serves all, and says what is left and what won.

    python -m bench.real --output-dir real/                         # make real; under 90 minutes on two cores
    python -m bench.real --output-dir real/ --force speed           # time again on a quiet machine; the rest stays
    python -m bench.real --model gemma3 --output-dir real-gemma3    # make real-gemma3; about 40 minutes

The model is SmolLM2-135M-Instruct or Gemma 3 270M, from the hub or from PyPI (bench/real/models.py). DDP, Tyr,
MaskPrune, Wanda and magnitude remove 20 and 50 % of its heads and channels, DDP and Wanda 20 % of Gemma's
(bench/real/plan.py); the best of each is trained back with finetune-pruned, and timed against the dense model. Of every
model: perplexity on held-out text, masked and converted in Transformers and served by vLLM, which must agree; 40
multiple-choice questions; a chat, or texts to go on with. The text is the English that ships with Python.

Ctrl-C stops it; the same command goes on from there, also in the middle of learning. A step is done again when its
options have changed, or a step that it builds on. --output-dir keeps all models (about 6 GB), logs of the servers, a
record of each step in records/, and in the end real.json, real.png and a report of the speeds.
"""

import argparse
import shlex
import sys
from pathlib import Path

from bench.real.models import MODELS
from bench.real.plan import PLANS
from bench.real.records import Records
from pruned_vllm.common.command import run_command
from pruned_vllm.common.errors import InputError


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.real", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", choices=MODELS, default="smollm2", help="default: smollm2")
    defaults = ", ".join(plan.directory for plan in PLANS.values())
    add("--output-dir", type=Path, metavar="DIR", help=f"created; default, by model: {defaults}")
    add("--data", nargs="+", default=[], metavar="SOURCE", help="to learn from, as for learn-masks")
    add("--eval-data", nargs="+", type=Path, default=[], metavar="FILE", help="UTF-8 text for perplexity")
    add(
        "--force",
        nargs="+",
        default=[],
        metavar="STEP",
        help="do again: a step, such as speed-50, or all of a kind: model, text, learn, convert, know (perplexity "
        "in Transformers, questions), serve (perplexity served, chat), recover, speed; what builds on them follows",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    command = shlex.join(["python", "-m", "bench.real", *(sys.argv[1:] if argv is None else argv)])
    return run_command("bench.real", lambda: real(args, command))


def real(args: argparse.Namespace, command: str) -> None:
    """Runs what is not done yet and writes the results. Raises InputError when a step fails."""
    from bench.real.pipeline import Inputs, run_steps
    from bench.real.results import collect, write
    from bench.tables.real import summary

    if missing := [str(path) for path in args.eval_data if not path.is_file()]:
        raise InputError("--eval-data takes text files; these are none:", missing)
    plan = PLANS[args.model]
    work = args.output_dir or Path(plan.directory)
    work.mkdir(parents=True, exist_ok=True)
    records = Records(work, plan.steps(), args.force)
    run_steps(Inputs(args.model, tuple(args.data), tuple(args.eval_data)), work, records)
    results = collect(MODELS[args.model], plan, records, work, command)
    write(results, work)
    print(summary(results))
    files = ("real.json", "real.png", "report.md", "report.html")
    print(f"written: {', '.join(f'{work}/{file}' for file in files)}")


if __name__ == "__main__":
    sys.exit(main())
