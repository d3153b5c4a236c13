"""Learns masks, and fine-tunes with LoRA, in one process and in two, with whole and with sharded weights: memory of a
process, time, and what is learned.

    python -m bench.learning_memory --output-dir bench/results/learning_memory

On the CPU, over gloo. Two kinds of models:

- large: random weights of about 240 MB in many layers, so that weights are most of what a process holds.
  `loading_bytes` and `peak_bytes` are, of each process, the most memory of its own until the weights are there and
  after that, above that before the run. Files that are mapped do not count, so weights are stored in bfloat16 and
  learned on in float32: then they are the process' own. `planned_bytes` is what learn-masks --plan says, without what
  was there before.
- pico: trained models of bench/pico.py, which learn for longer.

Fine-tuning distils a dense model into itself without a fifth of its units, so that a process holds parts of two models;
the first then merges LoRA into a whole one (`merging_bytes`), in its CPU memory.

`apart` is the largest distance of a mask, or of a weight that fine-tuning has written, from that of one process with
whole weights; 0.0 is bit for bit.
"""

import argparse
import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from bench.resident import OwnMemory
from bench.speed.results import describe_hardware, describe_versions
from pruned_vllm.common.command import run_command
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import write_json

FINETUNE = "finetune"
METHODS = ("ddp", "maskprune", FINETUNE)
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
SETTINGS: dict[str, dict[str, Any]] = {
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


class Subject(NamedTuple):
    """Paths of a dense model, of it without a fifth of its units, and of a text."""

    model: str
    pruned: str
    text: str


def _job(run: Run, subject: Subject) -> Any:
    from learner.job import METHODS as ROWS
    from learner.job import Job

    settings = ROWS[run.method].settings(**SETTINGS[run.kind])
    job = Job(
        subject.model,
        method=run.method,
        data=[subject.text],
        settings=settings,
        device="cpu",
        dtype="float32",
        agreement_prompts=0,
    )
    return replace(job, weights=run.weights)


def _finetune_job(run: Run, subject: Subject) -> Any:
    from learner.finetune.job import FinetuneJob

    return FinetuneJob(
        subject.pruned,
        data=[subject.text],
        teacher=subject.model,
        device="cpu",
        dtype="float32",
        weights=run.weights,
        agreement_prompts=0,
        **SETTINGS[run.kind],
    )


class _Watched:
    """The most memory of this process in each of some phases, above that before them."""

    def __init__(self) -> None:
        self.memory = OwnMemory()
        self.before = self.memory.now()
        self.peaks: list[int] = []

    def ended(self) -> None:
        """A phase has."""
        self.peaks.append(self.memory.peak_bytes - self.before)
        self.memory.forget_peak()

    def after(self, function: Callable) -> Callable:
        """`function`, with whose return a phase ends."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            self.ended()
            return result

        return watched


def _learn(run: Run, subject: Subject, out: str, small: Subject) -> None:
    """In one of the processes: prints what it took as JSON. It learns on a small model first, so that what Python and
    PyTorch load on the way does not count."""
    import torch

    torch.set_num_threads(1)
    from learner import learn as learning
    from learner.finetune import finetune as finetuning

    warm_up, steps = replace(run, kind="large"), SETTINGS[run.kind]["steps"]
    if run.method == FINETUNE:
        finetuning.finetune(_finetune_job(warm_up, small), Path(f"{out} small"))
        watched = _Watched()
        vars(finetuning)["load_dense"] = watched.after(finetuning.load_dense)  # loaded last
        trainer = finetuning.Distillation
        vars(finetuning)["Distillation"] = type(trainer.__name__, (trainer,), {"train": watched.after(trainer.train)})
        results = finetuning.finetune(_finetune_job(run, subject), Path(out))
        seconds = results["training_seconds"]
    else:
        learning.learn(_job(warm_up, small), Path(f"{out} small"))
        watched = _Watched()
        vars(learning)["load_dense"] = watched.after(learning.load_dense)
        (results,) = learning.learn(_job(run, subject), Path(out))
        seconds = results["learning_seconds"]
    watched.ended()
    phases = ("loading_bytes", "peak_bytes", "merging_bytes")
    print(json.dumps({**dict(zip(phases, watched.peaks, strict=False)), "step_s": seconds / steps}))


def _measure(run: Run, subject: Subject, out: Path, small: Subject) -> dict:
    """Starts the processes of a run; the record of them. Raises InputError where one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": run.processes}
    # What is freed is given back at once, so that the peak is that of what is held.
    shared |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": 1, "MALLOC_MMAP_THRESHOLD_": 65536}
    what = json.dumps([asdict(run), subject, str(out), small])
    command = [sys.executable, "-m", "bench.learning_memory", "--process", what]
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        group = []
        for rank in range(run.processes):
            place = {name: str(value) for name, value in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            errors = stack.enter_context(open(Path(directory, f"errors{rank}"), "w+", encoding="utf-8"))
            process = subprocess.Popen(
                command, env=os.environ | place, text=True, stdout=subprocess.PIPE, stderr=errors
            )
            group.append((process, errors))
        outputs = [process.communicate()[0] for process, _ in group]
        if any(process.returncode for process, _ in group):
            said = []
            for rank, (_, errors) in enumerate(group):
                errors.seek(0)
                said.append(f"process {rank}: {errors.read()[-2000:]}")
            raise InputError(f"{run} failed:", said)
    found = [json.loads(output.splitlines()[-1]) for output in outputs]
    return {
        **asdict(run),
        **{name: [process[name] for process in found] for name in found[0] if name != "step_s"},
        "step_s": max(process["step_s"] for process in found),
    }


def _planned(run: Run, subject: Subject) -> dict[str, float]:
    """Bytes of the weights, and what --plan says of a process without Python and PyTorch; it is for masks alone."""
    from learner.memory import needs
    from pruned_vllm.formats.config import dense_geometry, read_config
    from pruned_vllm.formats.geometry import ModelGeometry

    source = Path(subject.model)
    geometry, settings = dense_geometry(source, read_config(source)), SETTINGS[run.kind]
    weights_bytes = 4 * geometry.num_parameters
    if run.method == FINETUNE:
        pruned = ModelGeometry.from_config(read_config(Path(subject.pruned)))
        return {"weights_bytes": weights_bytes + 4 * pruned.num_parameters}
    tokens = settings["micro_batch_size"] * settings["sequence_length"]
    found = needs(geometry, _job(run, subject), 4, tokens, run.processes, on_gpu=False)
    planned = sum(size for name, size in found.device.items() if "Python" not in name)
    return {"weights_bytes": weights_bytes, "planned_bytes": planned}


def _apart(method: str, one: Path, other: Path) -> float:
    from safetensors.torch import load_file

    file = "model.safetensors" if method == FINETUNE else "pruning_masks.safetensors"
    tensors, others = (load_file(out / file) for out in (one, other))
    if list(tensors) != list(others):
        raise InputError(
            f"{one / file} has {len(tensors)} tensors and {other / file} {len(others)}, which are not the same: learn "
            "both again"
        )
    return max((others[name] - tensor).abs().max().item() for name, tensor in tensors.items() if tensor.numel())


def _random(name: str, directory: Path, **config: int) -> Subject:
    """Of a model with random weights, of LARGE but for `config`."""
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
    return _pruned(directory / "model", text, directory)


def _pruned(model: Path, text: Path, directory: Path) -> Subject:
    """Writes the pruned model in `directory`."""
    from converter.cli import main as convert
    from learner.cli import main as learn

    masks, pruned = (str(directory / name) for name in ("masks", "pruned"))
    options = ["--method", "magnitude", "--sparsity", "0.2", "--agreement-prompts", "0"]
    if learn([str(model), masks, *options]) or convert([masks, pruned]):
        raise InputError(f"{model} could not be pruned, for the reason above")
    return Subject(str(model), pruned, str(text))


def _runs(methods: list[str]) -> list[dict]:
    from bench.pico import pico_model

    records = []
    for kind, name in [(kind, name) for kind in SETTINGS for name in LARGE]:
        with tempfile.TemporaryDirectory() as temporary:
            directory = Path(temporary)
            small = _random(name, directory / "small", num_hidden_layers=1)
            if kind == "large":
                subject = _random(name, directory)
            else:
                model = pico_model(name)
                subject = _pruned(model, model / "train.txt", directory)
            for method in methods:
                outs = []
                for processes, weights in PLACES:
                    run = Run(kind, name, method, processes, weights)
                    outs.append(directory / f"{method} {processes} {weights}")
                    record = _measure(run, subject, outs[-1], small) | _planned(run, subject)
                    record["apart"] = _apart(method, outs[0], outs[-1])
                    records.append(record)
                    print(_line(record), flush=True)
    return records


def megabytes(sizes: float | list[float]) -> str:
    """Bytes of one process, or of each, as text."""
    return " and ".join(f"{size / 1e6:.0f}" for size in (sizes if isinstance(sizes, list) else [sizes])) + " MB"


def _line(record: dict) -> str:
    memory = []
    for phase in ("peak", "merging", "planned"):
        if sizes := record.get(f"{phase}_bytes"):
            memory.append(f"{phase} {megabytes(sizes)}")
    return (
        f"{record['kind']:<6}{record['model']:<10}{record['method']:<10}{record['processes']} x {record['weights']:<8} "
        f"{', '.join(memory)}; {record['step_s']:.2f} s a step, {record['apart']:.1e} apart"
    )


def _run(args: argparse.Namespace) -> None:
    if args.process:
        run, subject, out, small = json.loads(args.process)
        _learn(Run(**run), Subject(*subject), out, Subject(*small))
        return
    results = {
        "command": shlex.join(["python", "-m", "bench.learning_memory", *sys.argv[1:]]),
        "hardware": describe_hardware("cpu"),
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
    add(
        "--output-dir",
        type=Path,
        default=Path("results"),
        metavar="DIR",
        help="gets learning_memory.json, in place of an earlier one; default: results",
    )
    add("--process", help=argparse.SUPPRESS)  # what one of the processes is started with
    args = parser.parse_args()
    return run_command(parser.prog, lambda: _run(args))


if __name__ == "__main__":
    sys.exit(main())
