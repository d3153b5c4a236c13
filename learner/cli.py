"""learn-masks: learns which heads, FFN channels and channels of experts a model can do without.

learn-masks meta-llama/Llama-2-7b-hf ckpt/ --method ddp --sparsity 0.5 --data text/*.txt
convert-pruned ckpt/ out/
"""

import argparse
import types
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

from learner.job import AGREEMENT_PROMPTS, METHODS, PLACES, QUERY_HEADS, SELF_TOKENS, Job
from learner.plan import HERE, Devices, plan
from learner.targets import number_of_bytes, number_of_parameters, speedup
from pruned_vllm.common.arguments import (
    fraction,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    seed,
)
from pruned_vllm.common.command import run_command
from pruned_vllm.common.environment import add_version_argument
from pruned_vllm.common.errors import InputError

TYPES: dict[tuple[type, bool], Callable[[str], float]] = {(int, False): positive_int, (int, True): non_negative_int}
TYPES |= {(float, False): positive_float, (float, True): non_negative_float}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="learn-masks",
        description="Learns which attention heads, FFN channels and channels of experts a model can do without. "
        "Writes a masked checkpoint for convert-pruned: the masks, and the place of the weights, or the weights "
        "themselves if the method changes them. The router and shared experts of mixture-of-experts models stay; OLMoE "
        "and models with one latent vector for all heads (DeepSeek-V2 and later, GLM-4.7-Flash) keep their heads.",
        epilog="example: learn-masks meta-llama/Llama-2-7b-hf ckpt/ --sparsity 0.5 --data text/*.txt --dtype bfloat16",
    )
    add_version_argument(parser)
    add = parser.add_argument
    add("model", metavar="MODEL", help="dense model: directory or Hugging Face id")
    add(
        "out",
        metavar="CKPT",
        type=Path,
        nargs="?",
        help="directory to write; must not exist (see --overwrite); not needed for --plan",
    )
    add("--revision", metavar="NAME", help="commit, branch or tag of a hub id; default: the main branch")
    summaries = "; ".join(f"{name}: {method.summary}" for name, method in METHODS.items())
    add(
        "--method",
        choices=tuple(METHODS),
        default=Job.method,
        help=f"how to learn them. {summaries}; default: {Job.method}",
    )
    add(
        "--sparsity",
        type=fraction,
        nargs="+",
        metavar="SHARE",
        help="share of heads, channels and experts' channels to remove; several write a checkpoint each, CKPT/20 for "
        "0.2, what a smaller one keeps containing what a deeper one keeps (so for --target-... too); default: 0.5",
    )
    add(
        "--head-sparsity",
        type=fraction,
        default=Job.head_sparsity,
        metavar="SHARE",
        help="share of heads to remove, if it differs from --sparsity; 0 keeps all heads; default: as --sparsity",
    )
    joint = "in place of --sparsity: heads, channels and experts' channels compete for"
    for option, type_, example in (
        ("parameters", number_of_parameters, "so many parameters, such as 5B"),
        ("bytes", number_of_bytes, "so many bytes of weights, such as 9GB, in the dtype they are stored in"),
        ("speedup", speedup, "a time so much shorter at best, such as 1.5, in the workload of --at"),
    ):
        add(f"--target-{option}", type=type_, nargs="+", default=(), metavar="N", help=f"{joint} {example}")
    add(
        "--at",
        default=Job.at,
        metavar="CASE",
        help="workload for which the ideal speedup is counted: decode:BATCH:INPUT:OUTPUT, in bytes, so for batches "
        "that memory binds, or prefill:BATCH:INPUT, in operations; "
        f"default: {Job.at}",
    )
    by_default: dict[str, list[str]] = {default: [] for default in QUERY_HEADS}
    for name, method in METHODS.items():
        by_default[method.query_heads[0]].append(name)
    default_heads = ", ".join(f"{default} ({', '.join(names)})" for default, names in by_default.items() if names)
    add(
        "--query-heads",
        choices=QUERY_HEADS,
        help="in grouped query attention: whether the query heads of a KV head are removed one by one (the KV head "
        f"goes with its last query head), or all together, so that the KV cache shrinks more; default: {default_heads}",
    )
    add_text_arguments(parser)
    add(
        "--device",
        default=Job.device,
        help="device of PyTorch, for example cuda:1 or cpu; default: a GPU if there is one",
    )
    add(
        "--weights",
        choices=PLACES,
        help="where the weights are: whole on every device, sharded over the processes, layers spread over the GPUs of "
        "one process, or offloaded to CPU memory; default: sharded if accelerate is set up for FSDP, else whole",
    )
    add(
        "--dtype",
        default=Job.dtype,
        help="dtype of the weights while learning, for example bfloat16; default: as stored, but float32 on a CPU that "
        "has no instructions for 16 bits",
    )
    add("--trust-remote-code", action="store_true", help="run Python code that comes with the model; read it first")
    add(
        "--seed",
        type=seed,
        default=Job.seed,
        help="of random numbers and of the order of the data; default: 42",
    )
    add(
        "--tensorboard",
        type=Path,
        metavar="DIR",
        help="also write the figures of every step for TensorBoard; CKPT/learning.csv has them anyway",
    )
    add(
        "--report",
        action="store_true",
        help="draw what the masks leave of heads, FFN channels and experts, into CKPT/report; needs Matplotlib",
    )
    add(
        "--plan",
        nargs="?",
        const=HERE,
        metavar="DEVICES",
        help="learn nothing: say how much memory the run takes, from config.json alone, and whether it fits on "
        "DEVICES, such as 8x80GB, or on those of this machine",
    )
    add("--resume", action="store_true", help="go on with an interrupted run of the same command, if there is one")
    add("--overwrite", action="store_true", help="replace CKPT if this command wrote it, forget an interrupted run")
    _add_settings(parser)
    args = parser.parse_intermixed_args(argv)  # CKPT may be left out, and stand behind options
    if args.out is None and not args.plan:
        parser.error("the following arguments are required: CKPT")
    return run_command(parser.prog, lambda: _learn(vars(args)))


def add_text_arguments(parser: argparse.ArgumentParser, *, needs_data: bool = False) -> None:
    """--data and what else says where text comes from; see learner/data/reading.py."""
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        required=needs_data,
        metavar="SOURCE",
        help="what to learn from: UTF-8 text files, *.jsonl, *.parquet, data sets of the Hugging Face hub as "
        "owner/name or owner/name:configuration, which are streamed, or self: text that the dense model writes now, in "
        "a chat if it has a template for one; beside other sources it is half of the text",
    )
    parser.add_argument(
        "--self-tokens",
        type=positive_int,
        default=SELF_TOKENS,
        metavar="N",
        help="tokens to read of what the dense model writes for --data self, or fewer if the run reads fewer; kept in "
        f"the cache; default: {SELF_TOKENS}",
    )
    parser.add_argument(
        "--eval-data",
        nargs="+",
        default=[],
        metavar="SOURCE",
        help="text on which perplexity is measured, before and after, in blocks of 128 tokens; sources as for --data",
    )
    parser.add_argument(
        "--agreement-prompts",
        type=_number_of_prompts,
        default=AGREEMENT_PROMPTS,
        metavar="N",
        help=f"prompts, of {AGREEMENT_PROMPTS}, on whose answers agreement with the dense model is measured; 0 "
        f"measures none; default: {AGREEMENT_PROMPTS}",
    )
    parser.add_argument(
        "--text-column",
        default="text",
        metavar="NAME",
        help="column of JSONL, parquet and data sets that holds the text; default: text",
    )
    parser.add_argument(
        "--split", default="train", metavar="NAME", help="which split of data sets to read; default: train"
    )


def _number_of_prompts(text: str) -> int:
    """Type of a command line argument."""
    if (number := non_negative_int(text)) > AGREEMENT_PROMPTS:
        raise argparse.ArgumentTypeError(f"{number} is more than the {AGREEMENT_PROMPTS} prompts that there are")
    return number


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """Adds one option for each name among the settings of all methods, in groups by the methods that have it."""
    owners: dict[str, dict] = {}
    for name, method in METHODS.items():
        for field in fields(method.settings):
            owners.setdefault(field.name, {})[name] = field
    groups = {}
    for option, by_method in owners.items():
        title = ", ".join(by_method)
        if title not in groups:
            groups[title] = parser.add_argument_group(f"only with --method {title.replace(', ', ' or ')}")
        field = next(iter(by_method.values()))
        flag = f"--{option.replace('_', '-')}"
        hint = get_type_hints(METHODS[next(iter(by_method))].settings)[option]
        if isinstance(hint, types.UnionType):  # int | None
            hint = next(part for part in get_args(hint) if part is not types.NoneType)
        shown = {name: row.metadata["shown"] or row.default for name, row in by_method.items()}
        if len(set(shown.values())) == 1:
            default = str(next(iter(shown.values())))
        else:
            default = ", ".join(f"{value} ({name})" for name, value in shown.items())
        if hint is bool:
            groups[title].add_argument(
                flag, action="store_true", default=argparse.SUPPRESS, help=field.metadata["help"]
            )
            continue
        groups[title].add_argument(
            flag,
            type=TYPES.get((hint, field.metadata["zero"]), str),
            choices=field.metadata["choices"],
            metavar=None if field.metadata["choices"] else "N",
            default=argparse.SUPPRESS,
            help=f"{field.metadata['help']}; default: {default}",
        )


def _learn(arguments: dict) -> None:
    devices = arguments.pop("plan")
    out, run = (
        arguments.pop("out"),
        {name: arguments.pop(name) for name in ("overwrite", "resume", "tensorboard", "report")},
    )
    given = {field.name: arguments.pop(field.name) for field in fields(Job) if field.name in arguments}
    settings = METHODS[given["method"]].settings
    unknown = [
        f"--{name.replace('_', '-')}" for name in arguments if name not in {field.name for field in fields(settings)}
    ]
    if unknown:
        raise InputError(
            f"{given['method']} has no {', '.join(unknown)}; learn-masks --help lists the options of each method"
        )
    if devices is not None:
        given["data"] = given["data"] or ["any"]  # which is not read
    job = Job(**given, settings=settings(**arguments))
    if devices is not None:
        print(plan(job, Devices.parse(devices)))
        return
    from accelerate import PartialState  # late: --help, --plan and wrong arguments should not wait for torch

    from learner.learn import checkpoint_of, learn

    found = learn(job, out, **run)
    if PartialState().is_main_process:
        option = " --drop-empty-experts" if METHODS[job.method].drops_experts else ""
        for target, results in zip(job.targets, found, strict=True):
            checkpoint = checkpoint_of(out, target, len(found))
            for name, value in results.items():
                text = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
                print(f"{name.replace('_', ' '):>20}: {text}{f' at {job.at}' if name == 'ideal_speedup' else ''}")
            print(f"Wrote {checkpoint}. Next: convert-pruned {checkpoint} OUT{option}")


if __name__ == "__main__":
    import sys

    sys.exit(main())
