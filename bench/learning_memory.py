"""Learns masks in one process and in two, with whole and with sharded weights: memory of a process, time, and masks.

    python -m bench.learning_memory --output-dir bench/results/learning_memory

On the CPU, over gloo. Two kinds of models:

- large: random weights of about 240 MB in many layers, so that weights are most of what a process holds.
  `loading_bytes` and `peak_bytes` are, of each process, the most memory of its own until the weights are there and
  after that, above that before the run. Files that are mapped do not count, so weights are stored in bfloat16 and
  learned on in float32: then they are the process' own. `planned_bytes` is what learn-masks --plan says, without what
  was there before.
- pico: trained models of bench/pico.py, which learn for longer.

`apart` is the largest distance of a mask from that of one process with whole weights; 0.0 is bit for bit.
"""

import argparse
import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench.resident import OwnMemory
from bench.speed.results import describe_hardware, describe_versions
from pruned_vllm.common.command import run_command
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import write_json

METHODS = ("ddp", "maskprune")
VOCAB_SIZE = 4096  # of large models
LARGE: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 32, "intermediate_size": 1152},
    "qwen3_moe": {
        "num_hidden_layers": 24,
        "moe_intermediate_size": 96,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
}
SHARED = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 384,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "head_dim": 64,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
# By kind of model. Micro batches of one size, so that one process adds up the same numbers as two.
SETTINGS = {
    "large": {"steps": 4, "batch_size": 2, "micro_batch_size": 1, "sequence_length": 64},
    "pico": {"steps": 50, "batch_size": 8, "micro_batch_size": 4, "sequence_length": 128},
}
PLACES = ((1, "whole"), (2, "sharded"))  # processes, and where their weights are


@dataclass(frozen=True)
class Run:
    """What a group of processes learns."""

    kind: str
    model: str
    method: str
    processes: int
    weights: str


def _job(run: Run, directory: str, text: str) -> Any:
    from learner.job import METHODS as ROWS
    from learner.job import Job

    settings = ROWS[run.method].settings(**SETTINGS[run.kind])
    job = Job(
        directory, method=run.method, data=[text], settings=settings, device="cpu", dtype="float32", agreement_prompts=0
    )
    return replace(job, weights=run.weights)


def _learn(run: Run, directory: str, text: str, out: str, small: str, small_text: str) -> None:
    """In one of the processes: prints what it took as JSON. It learns on a small model first, so that what Python and
    PyTorch load on the way does not count."""
    import torch

    torch.set_num_threads(1)
    from learner import learn as learning

    learning.learn(_job(replace(run, kind="large"), small, small_text), Path(f"{out} small"))

    load, loading, memory = learning.load_dense, [], OwnMemory()
    before = memory.now()

    def loaded(*args: Any) -> Any:
        dense = load(*args)
        loading.append(memory.peak_bytes - before)
        memory.forget_peak()
        return dense

    vars(learning)["load_dense"] = loaded
    (results,) = learning.learn(_job(run, directory, text), Path(out))
    seconds = results["learning_seconds"] / SETTINGS[run.kind]["steps"]
    print(json.dumps({"loading_bytes": loading[0], "peak_bytes": memory.peak_bytes - before, "step_s": seconds}))


def _measure(run: Run, directory: Path, text: Path, out: Path, small: tuple[Path, Path]) -> dict:
    """Starts the processes of a run; the record of them. Raises InputError where one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": run.processes}
    # What is freed is given back at once, so that the peak is that of what is held.
    shared |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": 1, "MALLOC_MMAP_THRESHOLD_": 65536}
    what = json.dumps([asdict(run), *map(str, (directory, text, out, *small))])
    command = [sys.executable, "-m", "bench.learning_memory", "--process", what]
    group = []
    for rank in range(run.processes):
        place = {name: str(value) for name, value in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        pipe = subprocess.PIPE
        group.append(subprocess.Popen(command, env=os.environ | place, text=True, stdout=pipe, stderr=pipe))
    ended = [process.communicate() for process in group]
    for process, (_, errors) in zip(group, ended, strict=True):
        if process.returncode:
            raise InputError(f"{run} failed: {errors[-2000:]}")
    found = [json.loads(output.splitlines()[-1]) for output, _ in ended]
    return {
        **asdict(run),
        "loading_bytes": [process["loading_bytes"] for process in found],
        "peak_bytes": [process["peak_bytes"] for process in found],
        "step_s": max(process["step_s"] for process in found),
    }


def _planned(run: Run, directory: Path) -> tuple[int, float]:
    """Bytes of the weights, and what --plan says of a process, without Python and PyTorch."""
    from learner.memory import needs
    from pruned_vllm.formats.config import dense_geometry, read_config

    geometry, settings = dense_geometry(directory, read_config(directory)), SETTINGS[run.kind]
    tokens = settings["micro_batch_size"] * settings["sequence_length"]
    found = needs(geometry, _job(run, str(directory), "any"), 4, tokens, run.processes, on_gpu=False)
    return 4 * geometry.num_parameters, sum(size for name, size in found.device.items() if "Python" not in name)


def _apart(one: Path, other: Path) -> float:
    from safetensors.torch import load_file

    masks, others = (load_file(out / "pruning_masks.safetensors") for out in (one, other))
    if list(masks) != list(others):
        raise InputError(
            f"{one} has {len(masks)} masks and {other} {len(others)}, which are not the same: learn both again"
        )
    return max((others[name] - mask).abs().max().item() for name, mask in masks.items())


def _random(name: str, directory: Path, **config: int) -> tuple[Path, Path]:
    """A model with random weights, of LARGE but for `config`, and a text for it."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    sizes = AutoConfig.for_model(name, **SHARED | LARGE[name] | config)
    AutoModelForCausalLM.from_config(sizes, dtype=torch.bfloat16).save_pretrained(directory / "model")
    words = Tokenizer(models.WordLevel({str(index): index for index in range(VOCAB_SIZE)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(directory / "model")
    text = directory / "text.txt"
    text.write_text(" ".join(str(index * index % VOCAB_SIZE) for index in range(4000)))
    return directory / "model", text


def _runs(methods: list[str]) -> list[dict]:
    from bench.pico import pico_model

    records = []
    for kind, name in [(kind, name) for kind in SETTINGS for name in LARGE]:
        with tempfile.TemporaryDirectory() as temporary:
            directory = Path(temporary)
            small = _random(name, directory / "small", num_hidden_layers=1)
            if kind == "large":
                model, text = _random(name, directory)
            else:
                model = pico_model(name)
                text = model / "train.txt"
            for method in methods:
                outs = []
                for processes, weights in PLACES:
                    run = Run(kind, name, method, processes, weights)
                    outs.append(directory / f"{method} {processes} {weights}")
                    record = _measure(run, model, text, outs[-1], small)
                    record["weights_bytes"], record["planned_bytes"] = _planned(run, model)
                    record["apart"] = _apart(outs[0], outs[-1])
                    records.append(record)
                    peaks = ", ".join(f"{peak / 1e6:.0f}" for peak in record["peak_bytes"])
                    print(
                        f"{kind:<6}{name:<10}{method:<10}{processes} x {weights:<8} peak {peaks} MB (planned "
                        f"{record['planned_bytes'] / 1e6:.0f}), {record['step_s']:.2f} s a step, masks "
                        f"{record['apart']:.1e} apart",
                        flush=True,
                    )
    return records


def _run(args: argparse.Namespace) -> None:
    if args.process:
        run, *places = json.loads(args.process)
        _learn(Run(**run), *places)
        return
    results = {
        "command": shlex.join(["python", "-m", "bench.learning_memory", *sys.argv[1:]]),
        "hardware": describe_hardware(),
        "versions": describe_versions(),
        "settings": SETTINGS,
        "runs": _runs(args.methods),
    }
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(args.output_dir / "learning_memory.json", results)
    print(f"written: {args.output_dir / 'learning_memory.json'}")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.learning_memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--methods", nargs="+", choices=METHODS, default=METHODS, help="default: all")
    add("--output-dir", type=Path, default=Path("results"), metavar="DIR", help="created; default: results")
    add("--process", help=argparse.SUPPRESS)  # what one of the processes is started with
    args = parser.parse_args()
    return run_command(parser.prog, lambda: _run(args))


if __name__ == "__main__":
    sys.exit(main())
