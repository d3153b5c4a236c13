"""learn-masks: learns which heads and FFN channels of a model can go.

learn-masks meta-llama/Llama-2-7b-hf ckpt/ --method ddp --sparsity 0.5 --data text/*.txt
convert-pruned ckpt/ out/
"""

import argparse
from pathlib import Path

from pruned_vllm.command import check_output, run_command


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="learn-masks",
        description="Learns masks on a frozen model and writes a masked checkpoint for convert-pruned: the masks, and "
        "where the weights are. The weights themselves are not copied.",
        epilog="example: learn-masks meta-llama/Llama-2-7b-hf ckpt/ --sparsity 0.5 --data text/*.txt --dtype bfloat16",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="dense model: directory or Hugging Face id")
    add("out", metavar="CKPT", type=Path, help="directory to write; must not exist (see --overwrite)")
    add("--method", choices=("ddp", "magnitude", "random"), default="ddp", help="ddp learns; the others are baselines")
    add("--sparsity", type=_share, default=0.5, help="share of the heads, and of the channels, to remove")
    add("--data", type=Path, nargs="+", default=[], metavar="FILE", help="UTF-8 text files to learn from")
    add("--eval-data", type=Path, nargs="+", default=[], metavar="FILE", help="text files to measure perplexity on")
    add(
        "--gqa",
        choices=("tied", "independent"),
        default="tied",
        help="grouped query attention: tied removes KV heads with all their query heads, so the KV cache shrinks; "
        "independent removes single query heads",
    )
    add("--device", default="auto", help="torch device; auto is a GPU if there is one")
    add("--dtype", default="auto", help="dtype of the weights while learning; auto is as stored")
    add("--overwrite", action="store_true", help="replace CKPT if it is a masked checkpoint")
    ddp = parser.add_argument_group("ddp", "The defaults are the paper's (arXiv 2603.08065).")
    add = ddp.add_argument
    add("--steps", type=_count, default=1000, help="optimizer steps")
    add("--batch-size", type=_count, default=16, help="sequences in a step")
    add("--micro-batch-size", type=_count, default=16, help="sequences in one forward pass; lower it to save memory")
    add("--sequence-length", type=_count, default=2048, help="tokens in a sequence")
    add("--learning-rate", type=float, default=2e-2, help="of the mask parameters z")
    add("--lambda-learning-rate", type=float, default=2e-2, help="of the multipliers lambda1 and lambda3")
    add("--lambda2-learning-rate", type=float, default=0.8, help="of the multiplier lambda2")
    add("--warmup-steps", type=int, help="linear warm-up before the cosine decay; None is a tenth of --steps")
    add("--mu-start", type=float, default=0.5, help="mask value that counts half at the first step")
    add("--mu-end", type=float, default=0.05, help="mask value that counts half at the last step")
    add("--kd-weight", type=float, default=2.0, help="weight of the distillation loss; 0 learns without a teacher")
    add("--kd-temperature", type=float, default=1.0, help="temperature of the distillation loss")
    add("--seed", type=int, default=42, help="of initialization and data order")
    args = parser.parse_args(argv)
    return run_command(parser.prog, lambda: _learn(args))


def _learn(args: argparse.Namespace) -> None:
    check_output(args.out, args.overwrite, "pruning.json")
    # Imported late: --help and wrong arguments should not wait for torch.
    from dataclasses import fields

    from learner.ddp import DDPSettings
    from learner.learn import Job, learn

    given = vars(args)
    settings = DDPSettings(**{f.name: given[f.name] for f in fields(DDPSettings)})
    job = Job(ddp=settings, **{f.name: given[f.name] for f in fields(Job) if f.name in given})
    results = learn(job, args.out, overwrite=args.overwrite)
    for name, value in results.items():
        print(f"{name.replace('_', ' '):>20}: {value:.4g}")
    print(f"Wrote {args.out}. Next: convert-pruned {args.out} OUT")


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 0 and below 1")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value
