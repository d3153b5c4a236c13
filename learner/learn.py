"""Learns masks with the chosen method and writes the masked checkpoint."""

import importlib
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from learner.data import BlockSampler, read_tokens
from learner.evaluate import EVAL_BLOCK_SIZE, perplexity
from learner.journal import LOG_FILE, STATE_FILE, Journal
from learner.loading import load_dense, on_device
from learner.masking import apply_masks
from learner.method import Learned, Task
from learner.processes import together
from learner.settings import METHODS, Job
from learner.units import sparsity
from pruned_vllm.command import atomic_directory, check_output
from pruned_vllm.errors import InputError
from pruned_vllm.files import read_json, write_json
from pruned_vllm.masked_checkpoint import FORMAT_VERSION, MASKS_FILE, PRUNING_FILE

RESULTS_FILE = "learning.json"
JOB_FILE = "job.json"
ADAPTER_DIRECTORY = "adapter"
MAX_TOKENS = 2**25  # of one reading; more only if the run consumes more


def is_learned(directory: Path) -> bool:
    """Whether `learn` wrote `directory`, and every file in it."""
    if not (directory / RESULTS_FILE).is_file():
        return False
    written = read_json(directory / RESULTS_FILE).get("files", [])
    return _files(directory) <= {RESULTS_FILE, *written}


def _files(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir()}


def learn(
    job: Job, out: Path, *, overwrite: bool = False, resume: bool = False, tensorboard: Path | None = None
) -> dict[str, float]:
    """Writes a masked checkpoint to the directory `out`, with the results in learning.json; returns the results.

    Results: learning_seconds (of this process, so without those before an interruption), head_sparsity,
    channel_sparsity and expert_sparsity (shares of the units that masks were learned for), and with eval_data
    dense_perplexity and masked_perplexity.

    An interrupted run leaves its state in `<out>.unfinished`. In several processes (accelerate) all must call this;
    the first writes.

    Args:
        overwrite: replace `out` if this function wrote it, and forget an interrupted run.
        resume: go on with the interrupted run of the same job, if there is one.
        tensorboard: directory for event files.

    Raises:
        InputError: the model or the text cannot be used, learning diverges, or `out` exists.
    """
    method = METHODS[job.method]
    accelerator = on_device(job.device)
    results, blocks = {}, None
    with together(accelerator):
        check_output(out, overwrite, is_learned)
        model, tokenizer, units = load_dense(job, "cpu" if method.offloads else accelerator.device)
        if job.eval_data:
            eval_ids = _read(tokenizer, job.eval_data, job, accelerator)
            if len(eval_ids) < EVAL_BLOCK_SIZE:
                raise InputError(f"--eval-data has {len(eval_ids)} tokens; at least {EVAL_BLOCK_SIZE} are scored")
            results["dense_perplexity"] = perplexity(model, eval_ids)
        if method.reads_text:
            ids = _read(tokenizer, job.data, job, accelerator, job.settings.tokens)
            blocks = BlockSampler(ids, job.settings.sequence_length, job.seed)

    target = {kind: job.sparsity_of(kind) for kind in units.layers}
    with _journal(out, job, accelerator, resume, overwrite, tensorboard) as journal:
        started = time.perf_counter()
        learned = _function(method.module)(
            Task(model, units, target, job.settings, job.seed, blocks, journal, accelerator)
        )
        results["learning_seconds"] = time.perf_counter() - started
        model.eval()
        results |= {f"{kind}_sparsity": sparsity(values) for kind, values in learned.values.items()}
        masks = {name: mask.contiguous() for name, mask in units.to_masks(learned.values).items()}
        if job.eval_data:
            on_model = {name: mask.to(model.device) for name, mask in masks.items()}
            with apply_masks(model, on_model, learned.channel_mask_site):
                results["masked_perplexity"] = perplexity(model, eval_ids)
        with together(accelerator):
            if accelerator.is_main_process:
                with atomic_directory(out, overwrite=overwrite, is_ours=is_learned) as directory:
                    save_file(masks, directory / MASKS_FILE, metadata={"format": "pt"})
                    if learned.weights_changed:
                        model.save_pretrained(directory)
                        tokenizer.save_pretrained(directory)
                    if learned.save_adapter is not None:
                        learned.save_adapter(directory / ADAPTER_DIRECTORY)
                    write_json(directory / PRUNING_FILE, _pruning(job, learned))
                    journal.write_log(directory / LOG_FILE)
                    written = sorted(_files(directory))
                    write_json(directory / RESULTS_FILE, {"job": asdict(job), "results": results, "files": written})
    return results


def _read(
    tokenizer: PreTrainedTokenizerBase, sources: list[str], job: Job, accelerator: Accelerator, consumed: int = 0
) -> torch.Tensor:
    """Token ids [N]: at least what the run consumes, where there is as much, so that blocks come from all over it."""
    limit = max(consumed, MAX_TOKENS)
    return read_tokens(
        tokenizer,
        sources,
        limit=limit,
        column=job.text_column,
        split=job.split,
        seed=job.seed,
        show_progress=accelerator.is_main_process,
    )


def _function(name: str):
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function or "learn")


def _pruning(job: Job, learned: Learned) -> dict:
    base_model = str(Path(job.model).resolve()) if Path(job.model).is_dir() else job.model
    return {
        "format_version": FORMAT_VERSION,
        "method": job.method,
        "channel_mask_site": learned.channel_mask_site,
        "base_model": None if learned.weights_changed else base_model,
        "lora_adapter": ADAPTER_DIRECTORY if learned.save_adapter is not None else None,
    }


@contextmanager
def _journal(
    out: Path, job: Job, accelerator: Accelerator, resume: bool, overwrite: bool, tensorboard: Path | None
) -> Iterator[Journal]:
    """The journal of this run, in `<out>.unfinished`; what is there stays only where it can be resumed."""
    directory = out.with_name(f"{out.name}.unfinished")
    asked = json.loads(json.dumps(asdict(job), default=str))
    with together(accelerator):
        if accelerator.is_main_process and directory.exists():
            if overwrite and not resume:
                shutil.rmtree(directory)
            else:
                _check_resumable(directory, asked, resume)
        if accelerator.is_main_process and not directory.exists():
            directory.mkdir(parents=True)
            write_json(directory / JOB_FILE, asked)
        journal = Journal(directory, tensorboard, accelerator.is_main_process)
    try:
        yield journal
    except BaseException:
        if accelerator.is_main_process and not (directory / STATE_FILE).exists():
            shutil.rmtree(directory, ignore_errors=True)
        elif accelerator.is_main_process:
            print(f"The run so far is kept in {directory}; the same command with --resume goes on.")
        raise
    if accelerator.is_main_process:
        shutil.rmtree(directory)


def _check_resumable(directory: Path, asked: dict, resume: bool) -> None:
    if not resume:
        raise InputError(f"{directory} holds an interrupted run; go on with --resume, or forget it with --overwrite")
    begun = read_json(directory / JOB_FILE)
    changed = [f"{key}: {begun.get(key)}, now {asked[key]}" for key in asked if begun.get(key) != asked[key]]
    if changed:
        raise InputError(f"{directory} holds a run of another job; forget it with --overwrite:", changed)
