"""learn-masks: learns which heads and FFN channels of a model can go.

learn-masks meta-llama/Llama-2-7b-hf ckpt/ --method ddp --sparsity 0.5 --data text/*.txt
convert-pruned ckpt/ out/
"""

import argparse
import dataclasses
from pathlib import Path

from learner.settings import BUDGETS, METHODS, DDPSettings, Job
from pruned_vllm.command import fraction, positive_float, positive_int, run_command


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="learn-masks",
        description="Learns masks on a frozen model and writes a masked checkpoint for convert-pruned: the masks, and "
        "where the weights are. The weights themselves are not copied. A head is removed with its KV head, so in "
        "grouped query attention with all query heads of its group. Of mixture-of-experts models the channels of the "
        "routed experts are removed, not the router or shared experts; OLMoE keeps its heads.",
        epilog="example: learn-masks meta-llama/Llama-2-7b-hf ckpt/ --sparsity 0.5 --data text/*.txt --dtype bfloat16",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="dense model: directory or Hugging Face id")
    add("out", metavar="CKPT", type=Path, help="directory to write; must not exist (see --overwrite)")
    add("--method", choices=METHODS, default=Job.method, help="ddp learns, the others are baselines; default: ddp")
    add(
        "--sparsity",
        type=fraction,
        default=Job.sparsity,
        help="share of heads, channels and experts' channels to remove; default: 0.5",
    )
    add(
        "--head-sparsity",
        type=fraction,
        default=Job.head_sparsity,
        help="share of heads to remove, 0 leaves them as they are; default: as --sparsity",
    )
    add("--data", type=Path, nargs="+", default=[], metavar="FILE", help="UTF-8 text to learn from; ddp needs it")
    add(
        "--eval-data",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="text to measure the perplexity of the dense and the masked model on, in blocks of 128 tokens",
    )
    add("--device", default=Job.device, help="torch device; default: a GPU if there is one")
    add("--dtype", default=Job.dtype, help="dtype of the weights while learning; default: as stored")
    add("--seed", type=int, default=Job.seed, help="of initialization and data order; default: 42")
    add("--overwrite", action="store_true", help="replace CKPT if this command wrote it")
    ddp = parser.add_argument_group("ddp", "The defaults are the paper's (arXiv 2603.08065).")

    def setting(name: str, type, text: str) -> None:
        default = getattr(DDPSettings, name)
        shown = "a tenth of --steps" if default is None else default
        ddp.add_argument(
            f"--{name.replace('_', '-')}", type=type, default=default, metavar="N", help=f"{text}; default: {shown}"
        )

    setting("steps", positive_int, "optimizer steps")
    setting("batch_size", positive_int, "sequences in a step")
    setting("micro_batch_size", positive_int, "sequences in one forward pass; lower it to save memory")
    setting("sequence_length", positive_int, "tokens in a sequence")
    setting("learning_rate", positive_float, "of the mask parameters z")
    setting("lambda_learning_rate", positive_float, "of the multipliers lambda1 and lambda3")
    setting("lambda2_learning_rate", positive_float, "of lambda2; raise it when a short run misses its budget")
    setting("warmup_steps", positive_int, "linear warm-up before the cosine decay")
    setting("mu_start", positive_float, "mask value that counts half at the first step")
    setting("mu_end", positive_float, "mask value that counts half at the last step")
    setting("kd_weight", float, "weight of the distillation loss, 0 learns without a teacher")
    setting("kd_temperature", positive_float, "temperature of the distillation loss")
    ddp.add_argument(
        "--budget",
        choices=BUDGETS,
        default=DDPSettings.budget,
        help="what loses the share by itself: the whole model, each layer, or each expert; default: global",
    )
    args = parser.parse_args(argv)
    return run_command(parser.prog, lambda: _learn(vars(args)))


def _learn(arguments: dict) -> None:
    from learner.learn import learn  # late: --help and wrong arguments should not wait for torch

    out, overwrite = arguments.pop("out"), arguments.pop("overwrite")
    ddp = {field.name: arguments.pop(field.name) for field in dataclasses.fields(DDPSettings)}
    for name, value in learn(Job(**arguments, ddp=DDPSettings(**ddp)), out, overwrite=overwrite).items():
        print(f"{name.replace('_', ' '):>20}: {value:.4g}")
    print(f"Wrote {out}. Next: convert-pruned {out} OUT")
