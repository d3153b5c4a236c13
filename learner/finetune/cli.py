"""finetune-pruned: trains a converted model further, to win back what pruning lost.

convert-pruned ckpt/ out/
finetune-pruned out/ recovered/ --data text/*.txt --teacher meta-llama/Llama-2-7b-hf
vllm serve recovered/
"""

import argparse
import shlex
from pathlib import Path

from learner.cli import add_text_arguments
from pruned_vllm.common.arguments import non_negative_int, positive_float, positive_int, seed
from pruned_vllm.common.command import run_command
from pruned_vllm.common.environment import add_version_argument

PLACES = ("whole", "sharded")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="finetune-pruned",
        description="Trains a converted model further on text, by LoRA (merged in the end) or all of its weights, and "
        "writes a converted model with the same sizes. Routers of experts stay as they are.",
        epilog="example: finetune-pruned out/ recovered/ --data text/*.txt --teacher meta-llama/Llama-2-7b-hf",
    )
    add_version_argument(parser)
    add = parser.add_argument
    add("model", metavar="OUT", help="directory that convert-pruned wrote")
    add("out", metavar="RECOVERED", type=Path, help="directory to write; must not exist (see --overwrite)")
    add_text_arguments(parser, needs_data=True)
    add(
        "--teacher",
        metavar="MODEL",
        help="dense model whose predictions the pruned one learns, that writes the text of --data self, and that "
        "agreement is measured with: directory or Hugging Face id; default: none, learn from the text alone",
    )
    add(
        "--kd-weight",
        type=positive_float,
        default=2.0,
        metavar="N",
        help="weight of the loss against the teacher; default: 2",
    )
    add(
        "--lora-rank",
        type=non_negative_int,
        default=16,
        metavar="N",
        help="rank of LoRA; 0 trains all weights instead; default: 16",
    )
    add("--steps", type=positive_int, default=300, metavar="N", help="optimizer steps; default: 300")
    add(
        "--batch-size",
        type=positive_int,
        default=16,
        metavar="N",
        help="sequences in a step, on all devices together; default: 16",
    )
    add(
        "--micro-batch-size",
        type=positive_int,
        metavar="N",
        help="sequences in one forward pass; lower it to save memory; default: as --batch-size",
    )
    add(
        "--sequence-length",
        type=positive_int,
        metavar="N",
        help="tokens in a sequence; default: 2048, or fewer if the model has fewer positions",
    )
    add(
        "--learning-rate",
        type=positive_float,
        metavar="N",
        help="learning rate at its peak; default: by the model's hidden size, with LoRA 1.3e-3 at 576, 5e-4 at 2048, "
        "2.9e-4 at 4096, 1.7e-4 at 8192; a tenth of that for all weights",
    )
    add("--gradient-checkpointing", action="store_true", help="compute activations again: less memory, more time")
    add(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="cuda is the first GPU that CUDA_VISIBLE_DEVICES leaves; auto is that if there is one (default)",
    )
    add(
        "--weights",
        choices=PLACES,
        help="where the weights are in several processes: whole on every device, or with LoRA sharded over them; "
        "default: sharded if accelerate is set up for FSDP, else whole",
    )
    add(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="dtype of the weights while training; auto (default): as stored with LoRA, float32 when all weights are "
        "trained or the CPU multiplies 16 bits slower. They are saved in the dtype they had",
    )
    add("--seed", type=seed, default=42, help="of the order of the data and of LoRA's first weights; default: 42")
    add("--resume", action="store_true", help="go on with an interrupted run of the same command, if there is one")
    add(
        "--overwrite",
        action="store_true",
        help="replace RECOVERED if this command wrote it, forget an interrupted run",
    )
    args = parser.parse_args(argv)
    return run_command(parser.prog, lambda: _finetune(vars(args)))


def _finetune(arguments: dict) -> None:
    from accelerate import PartialState

    from learner.finetune.finetune import finetune  # late: --help should not wait for torch
    from learner.finetune.job import FinetuneJob

    out, overwrite, resume = (arguments.pop(name) for name in ("out", "overwrite", "resume"))
    arguments["micro_batch_size"] = arguments["micro_batch_size"] or arguments["batch_size"]
    results = finetune(FinetuneJob(**arguments), out, overwrite=overwrite, resume=resume)
    if not PartialState().is_main_process:
        return
    for name, value in results.items():
        print(f"{name.replace('_', ' '):>20}: {value:.4g}")
    print(f"Wrote {out}. Serve it: vllm serve {shlex.quote(str(out))}")


if __name__ == "__main__":
    raise SystemExit(main())
