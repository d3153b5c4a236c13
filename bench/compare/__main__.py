"""Compares methods, kinds of text and recovery at equal size on a real pretrained model.

    python -m bench.compare --output-dir compare/                      # make compare; about 8 hours on two cores
    python -m bench.compare --output-dir compare/ --only ddp-20 flap-20 depth-20      # some of it
    python -m bench.compare --output-dir compare/ --force speed                       # time again on a quiet machine
    python -m bench.compare --output-dir compare/ --device cuda --untimed             # about an hour, on a GPU

On SmolLM2-135M-Instruct: DDP, Tyr, MaskPrune and the scores of Wanda (wanda-sp), FLAP, LLM-Pruner (taylor), ShortGPT
(depth), magnitude and random, at 20 and 50 %; DDP on foreign text, on text of the dense model's own, and on both; and
recovery of the last on 250,000 tokens of each, and on 1,000,000; on a GPU also from more of its own text, and after
DDP on 1,000,000 tokens. Of every model: size, perplexity on held-out text, 40 questions, agreement with the dense
model's answers to 50 prompts, three answers, and against the dense one on vLLM the time of decoding. compare.png shows
perplexity against that.

Ctrl-C stops it; the same command goes on from there, also in the middle of learning. --output-dir keeps all models, a
record of each step in records/, compare.json, which is written after each model, and in the end compare.md and
compare.png. They hold all that is complete by then, also of earlier runs in the same directory.
"""

import argparse
import shlex
import sys
from pathlib import Path

from bench.compare import plan
from bench.real.models import MODELS
from bench.real.records import Records
from pruned_vllm.common.command import run_command
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import write_json


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output-dir", type=Path, default=Path("compare"), metavar="DIR", help="created; default: compare")
    add("--model", default="smollm2", metavar="NAME", help=f"{', '.join(MODELS)}, or a directory; default: smollm2")
    add(
        "--only",
        nargs="+",
        default=[],
        metavar="NAME",
        help="models to measure, with those that they are made from; default: all that are for the device. There are "
        f"{', '.join(plan.variants())}",
    )
    add(
        "--device",
        default="cpu",
        choices=("cpu", "cuda"),
        help="that models are learned, trained and examined on; default: %(default)s",
    )
    add("--untimed", action="store_true", help="measure no times of decoding now; without this option they come later")
    add(
        "--force",
        nargs="+",
        default=[],
        metavar="STEP",
        help="do again: a step, such as speed-ddp-20, or all of a kind: model, text, learn, convert, recover, know, "
        "speed",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    command = shlex.join(["python", "-m", "bench.compare", *(sys.argv[1:] if argv is None else argv)])
    return run_command("bench.compare", lambda: compare(args, command))


def compare(args: argparse.Namespace, command: str) -> None:
    """Runs what is not done yet and writes the results. Raises InputError when a step fails."""
    from bench.compare.pipeline import run_steps
    from bench.compare.results import RESULTS_FILE, collect, write
    from bench.tables.compare import summary
    from learner.model.dense import on_device

    try:
        models = plan.chosen(args.only, args.device)
    except KeyError as error:
        raise InputError(f"no model is called {error.args[0]}; there are {', '.join(plan.variants())}") from None
    on_device(args.device)  # which refuses a GPU that is not there
    args.output_dir.mkdir(parents=True, exist_ok=True)
    records = Records(args.output_dir, plan.planned(models, timed=not args.untimed), args.force)
    results: dict = {}
    for complete in run_steps(models, args.output_dir, records, args.model, timed=not args.untimed, device=args.device):
        results = collect(records, complete, args.output_dir, command, args.device)
        write_json(args.output_dir / RESULTS_FILE, results)
    write(results, args.output_dir)
    print(summary(results))
    print(f"written: {', '.join(f'{args.output_dir}/compare.{kind}' for kind in ('json', 'md', 'png'))}")


if __name__ == "__main__":
    sys.exit(main())
