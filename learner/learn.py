"""Learns masks with the chosen method and writes the masked checkpoint."""

import importlib
import time
from dataclasses import asdict
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import save_file

from learner.data.text import evaluation_tokens, training_blocks
from learner.job import METHODS, Job
from learner.methods.method import Learned, Task
from learner.model.dense import load_dense, on_device
from learner.model.masking import apply_masks
from learner.model.perplexity import perplexity
from learner.model.saving import save_model
from learner.model.units import sparsity
from learner.run.disk import writing
from learner.run.journal import LOG_FILE, STATE_FILE, Journal
from learner.run.processes import together
from learner.run.resume import unfinished_run
from pruned_vllm.common.directories import atomic_directory, check_output
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import read_json, write_json
from pruned_vllm.formats.companions import DOWNLOADED, find_companions
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.hub import model_directory
from pruned_vllm.formats.masked import MASKS_FILE, PruningInfo
from pruned_vllm.pattern import pattern_of_masks, require_matplotlib, write_report

RESULTS_FILE = "learning.json"
ADAPTER_DIRECTORY = "adapter"


def is_learned(directory: Path) -> bool:
    """Whether `learn` wrote `directory`, and every file in it."""
    if not (directory / RESULTS_FILE).is_file():
        return False
    written = read_json(directory / RESULTS_FILE).get("files", [])
    return _files(directory) <= {RESULTS_FILE, *written}


def _files(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir()}


def learn(
    job: Job,
    out: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    tensorboard: Path | None = None,
    report: bool = False,
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
        report: draw what the masks leave, see pruned_vllm/pattern.py.

    Raises:
        InputError: the model or the text cannot be used, learning diverges, or `out` exists.
    """
    method = METHODS[job.method]
    accelerator = on_device(job.device)
    results, blocks = {}, None
    with together(accelerator):
        _check_unsharded(accelerator)
        check_output(out, overwrite, is_learned)
        if report:
            require_matplotlib()
        source = model_directory(job.model, ["config.json", *DOWNLOADED])
        find_companions(source)  # what cannot be copied is refused now
        model, tokenizer, units = load_dense(job, "cpu" if method.offloads else accelerator.device)
        if job.eval_data:
            eval_ids = evaluation_tokens(model, tokenizer, job, accelerator.is_main_process)
            results["dense_perplexity"] = perplexity(model, eval_ids)
        if method.reads_text:
            length, consumed = job.settings.sequence_length, job.settings.tokens
            blocks = training_blocks(model, tokenizer, job, length, consumed, accelerator.is_main_process)

    target = {kind: job.sparsity_of(kind) for kind in units.layers}
    kept = unfinished_run(
        out, job, lambda path: (path / STATE_FILE).exists(), accelerator, resume=resume, overwrite=overwrite
    )
    with kept as unfinished:
        with together(accelerator):
            journal = Journal(unfinished, tensorboard, accelerator.is_main_process)
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
                with writing(), atomic_directory(out, overwrite=overwrite, is_ours=is_learned) as directory:
                    save_file(masks, directory / MASKS_FILE, metadata={"format": "pt"})
                    if learned.weights_changed:
                        save_model(model, source, directory)
                    if learned.save_adapter is not None:
                        learned.save_adapter(directory / ADAPTER_DIRECTORY)
                    _pruning(job, learned).write(directory)
                    journal.write_log(directory / LOG_FILE)
                    if report:
                        geometry = ModelGeometry.from_config(model.config.to_dict())
                        arrays = {name: mask.numpy() for name, mask in masks.items()}
                        write_report(pattern_of_masks(geometry, arrays), directory)
                    written = sorted(_files(directory))
                    write_json(directory / RESULTS_FILE, {"job": asdict(job), "results": results, "files": written})
    return results


def _check_unsharded(accelerator: Accelerator) -> None:
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise InputError(
            f"accelerate is set up for {accelerator.distributed_type.value}, which shards the weights over devices; "
            "learn-masks needs all of them on each device: choose multi-GPU without it in `accelerate config`"
        )


def _function(name: str):
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function or "learn")


def _pruning(job: Job, learned: Learned) -> PruningInfo:
    base_model = str(Path(job.model).resolve()) if Path(job.model).is_dir() else job.model
    return PruningInfo(
        method=job.method,
        channel_mask_site=learned.channel_mask_site,
        base_model=None if learned.weights_changed else base_model,
        lora_adapter=ADAPTER_DIRECTORY if learned.save_adapter is not None else None,
    )
