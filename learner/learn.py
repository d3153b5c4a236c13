"""Learns masks with the chosen method and writes the masked checkpoint, or one for each of several budgets."""

import importlib
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from learner.data.text import evaluation_tokens, num_positions, training_blocks
from learner.job import METHODS, Job
from learner.methods.method import Learned, Task
from learner.model.agreement import Reference
from learner.model.budget import make_budgets
from learner.model.dense import DenseModel, check_dense, load_dense, on_device
from learner.model.masking import apply_masks, restrict_routers
from learner.model.perplexity import perplexity
from learner.model.placement import cast, place_of
from learner.model.saving import check_can_be_saved, save_model
from learner.outcome import Outcome, left_by
from learner.run.disk import writing
from learner.run.journal import LOG_FILE, STATE_FILE, Journal
from learner.run.processes import explained, together
from learner.run.resume import refuse_unfinished, unfinished_run
from learner.settings import with_sequence_length
from learner.targets import Target
from pruned_vllm.common.directories import atomic_directory, prepare_output
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import write_json
from pruned_vllm.formats.companions import find_companions
from pruned_vllm.formats.fingerprint import Fingerprint
from pruned_vllm.formats.masked import MASKS_FILE, PruningInfo
from pruned_vllm.pattern import pattern_of_masks, require_matplotlib, write_report

WRITER = "learn-masks"  # whose output only this command replaces
RESULTS_FILE = "learning.json"
ADAPTER_DIRECTORY = "adapter"


@explained()
def learn(
    job: Job,
    out: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    tensorboard: Path | None = None,
    report: bool = False,
) -> list[dict[str, float]]:
    """Writes a masked checkpoint to the directory `out`, with the results in learning.json; returns the results.

    Where the job has several targets, there is a checkpoint for each below `out`, under the target's name, and results
    for each, from the one that removes least to the one that removes most.

    Results: learning_seconds (of this process, so without those before an interruption), head_sparsity,
    channel_sparsity and expert_sparsity (shares of the units that masks were learned for), parameters, bytes,
    ideal_speedup and padded_ideal_speedup (see learner/outcome.py), with eval_data dense_perplexity and
    masked_perplexity, and agreement with the dense model (see learner/model/agreement.py).

    An interrupted run leaves its state in `<out>.unfinished`. In several processes (accelerate) all must call this;
    the first writes.

    Args:
        overwrite: replace what this function wrote in `out`, and forget an interrupted run.
        resume: go on with the interrupted run of the same job, if there is one.
        tensorboard: directory for event files.
        report: draw what the masks leave, see pruned_vllm/pattern.py.

    Raises:
        InputError: the model or the text cannot be used, learning diverges, `out` exists, the memory is not enough, or
            another process has failed.
    """
    method = METHODS[job.method]
    accelerator = on_device(job.device)
    common, blocks, inputs, show = {}, None, {}, accelerator.is_main_process
    with together(accelerator):
        place = place_of(job.weights, accelerator, method.places)
        if accelerator.is_main_process:
            prepare_output(out, writer=WRITER, overwrite=overwrite)
            refuse_unfinished(out, resume=resume, overwrite=overwrite)
        if report:
            require_matplotlib()
            if len(job.targets) > 1:
                raise InputError("--report draws what one budget leaves; leave it out where there are several")
        checked = check_dense(job, place)
    with together(accelerator):
        device = torch.device("cpu") if method.offloads else accelerator.device
        dense = load_dense(job, device, place, accelerator, checked)
        model, tokenizer, units = dense.model, dense.tokenizer, dense.units
        inputs["model"] = str(dense.fingerprint)
        settings = with_sequence_length(job.settings, num_positions(model))
        if job.dtype == "auto" and model.dtype != dense.stored_dtype:
            accelerator.print(f"Computing in {model.dtype}: this CPU has no fast {dense.stored_dtype}; see --dtype.")
        job = replace(job, revision=dense.commit, settings=settings)
        if method.changes_weights:
            find_companions(dense.directory)  # what cannot be copied is refused now
            check_can_be_saved(model, job.model)
        written = dense.stored_dtype if job.dtype == "auto" or not method.changes_weights else model.dtype
        element_bytes = written.itemsize
        budgets = make_budgets(job, units, dense.geometry, element_bytes)
    if method.reads_text:
        length, sequences = settings.sequence_length, settings.sequences
        blocks = training_blocks(model, tokenizer, job, length, sequences, dense, accelerator)
        inputs["text of --data, or the tokenizer"] = blocks.digest()
    with together(accelerator):
        if job.eval_data:
            eval_ids = evaluation_tokens(model, tokenizer, job, show)

    def measure(title: str) -> float:
        return perplexity(model, eval_ids, title=title, show_progress=show, device=device)

    run = unfinished_run(out, job, inputs, _has_state, accelerator, resume=resume, overwrite=overwrite)
    with run as unfinished:
        with together(accelerator):
            journal = Journal(unfinished, tensorboard, show)
            if job.eval_data:
                common["dense_perplexity"] = measure("dense perplexity")
            reference = Reference.of(dense, job.agreement_prompts, accelerator.print, show)
        started = time.perf_counter()
        learned = _function(method.module)(
            Task(model, units, budgets, job.settings, job.seed, blocks, journal, accelerator)
        )
        common["learning_seconds"] = time.perf_counter() - started
        model.eval()
        found = []
        for budget, values in zip(budgets, (*learned.shallower, learned.values), strict=True):
            masks = {name: mask.contiguous() for name, mask in units.to_masks(values).items()}
            left = left_by(dense.geometry, masks, method.drops_experts)
            outcome = Outcome(budget, dense.geometry, left, values, job.at, element_bytes)
            results = common | outcome.results()
            on_model = {name: mask.to(dense.device) for name, mask in masks.items()}
            routers = restrict_routers(model, on_model) if method.drops_experts else nullcontext()
            with apply_masks(model, on_model, learned.channel_mask_site), routers:
                if job.eval_data:
                    results["masked_perplexity"] = measure("masked perplexity")
                if reference is not None:
                    results |= reference.agreement(model)
            found.append((outcome, masks, results))
        with together(accelerator):
            if accelerator.is_main_process:
                with writing(), atomic_directory(out, writer=WRITER, overwrite=overwrite) as directory:
                    for outcome, masks, results in found:
                        checkpoint = checkpoint_of(directory, outcome.budget.target, len(found))
                        checkpoint.mkdir(exist_ok=True)
                        _write(checkpoint, job, dense, learned, outcome, masks)
                        write_json(checkpoint / RESULTS_FILE, {"job": asdict(job), "results": results})
                        if report:
                            arrays = {name: mask.numpy() for name, mask in masks.items()}
                            write_report(pattern_of_masks(dense.geometry, arrays), checkpoint)
                    journal.write_log(directory / LOG_FILE)
    return [results for _, _, results in found]


def checkpoint_of(out: Path, target: Target, number: int) -> Path:
    """Where the checkpoint for one of a `number` of targets lies: `out` itself where there is but one."""
    return out if number == 1 else out / target.name


def _has_state(unfinished: Path) -> bool:
    return (unfinished / STATE_FILE).exists()


def _function(name: str):
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function or "learn")


def _write(
    directory: Path, job: Job, dense: DenseModel, learned: Learned, outcome: Outcome, masks: dict[str, torch.Tensor]
) -> None:
    """The files of a masked checkpoint that the converter reads. The model of `dense` has what the method changed."""
    save_file(masks, directory / MASKS_FILE, metadata={"format": "pt"})
    fingerprint = dense.fingerprint
    if METHODS[job.method].changes_weights:
        if job.dtype == "auto":
            cast(dense.model, dense.stored_dtype)
        save_model(dense.model, dense.directory, directory)
    if learned.save_adapter is not None:
        learned.save_adapter(directory / ADAPTER_DIRECTORY)
    if METHODS[job.method].changes_weights:
        fingerprint = Fingerprint.from_directory(directory)
    _pruning(job, learned, str(fingerprint), outcome).write(directory)


def _pruning(job: Job, learned: Learned, fingerprint: str, outcome: Outcome) -> PruningInfo:
    """pruning.json; `fingerprint` is of the model that the masks belong to, beside them or elsewhere."""
    is_elsewhere, is_directory = not METHODS[job.method].changes_weights, Path(job.model).is_dir()
    base_model = str(Path(job.model).resolve()) if is_directory else job.model
    return PruningInfo(
        method=job.method,
        channel_mask_site=learned.channel_mask_site,
        base_model=base_model if is_elsewhere else None,
        lora_adapter=ADAPTER_DIRECTORY if learned.save_adapter is not None else None,
        base_revision=job.revision if is_elsewhere else None,
        base_fingerprint=fingerprint,
        budget=outcome.as_json(),
    )
