"""Trains a converted model further, to win back what pruning lost, and saves it as a converted model again.

    finetune(FinetuneJob(model="out/", data=["text.txt"]), Path("recovered/"))

Transformers' Trainer is the loop (AdamW, warm-up, cosine decay), PEFT the LoRA. Notable facts:

- LoRA sits on every projection: attention, MLPs, experts. It is merged in the end, so `recovered/` has the same tensors
  as `out/` and is served in the same way. Rank 0 trains all weights. Routers are never trained, because the experts
  that are left depend on their choices.
- Logits are made in pieces (learner/finetune/distillation.py). Blocks of text are full: documents follow each other,
  with an end token between them, and nothing is padded.
- Several processes (`torchrun --nproc_per_node 2 -m learner.finetune.cli ...`) share each batch and take the same steps
  as one process, so a run may be resumed by another number of them. Each holds the whole model, or with LoRA a part of
  it, and of the teacher (FSDP2); then the first process holds the whole in CPU memory when LoRA is merged.
- All weights are trained in float32, unless told otherwise: steps of fine-tuning are too small for bfloat16. They are
  saved in the dtype of `out/`.
- config.json, tokenizer and licences are copied, not written anew. finetuning.json has settings, results and the log.
- Until it is complete, the Trainer's checkpoints lie in `recovered.unfinished/`. A resumed run ends with the weights of
  an uninterrupted one.
"""

import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import patch_environment
from torch import nn
from transformers import TrainingArguments

from learner.data.text import evaluation_tokens, num_positions, training_blocks
from learner.finetune.distillation import Distillation
from learner.finetune.job import (
    FSDP,
    FinetuneJob,
    check_job,
    default_learning_rate,
    place_of_job,
    processes_and_micro_batch,
)
from learner.finetune.model import check_same_tokens, check_teacher, load, merged, merged_beside, spread, trainable
from learner.job import Job
from learner.model.agreement import Reference
from learner.model.dense import dtype_of, load_dense
from learner.model.perplexity import EVAL_BLOCK_SIZE, perplexity
from learner.model.placement import cast, fast_dtype, loading_options
from learner.model.saving import check_can_be_saved, save_model
from learner.run.disk import writing
from learner.run.processes import explained, together
from learner.run.resume import refuse_unfinished, unfinished, unfinished_run
from learner.settings import with_sequence_length
from pruned_vllm.common.directories import atomic_directory, prepare_output
from pruned_vllm.common.files import FINETUNING_FILE, write_json
from pruned_vllm.formats.config import read_config
from pruned_vllm.formats.fingerprint import Fingerprint
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.headers import read_headers
from pruned_vllm.hf.loading import load_pruned

WRITER = "finetune-pruned"  # whose output only this command replaces
SAVE_EVERY = 50  # steps
LOG_EVERY = 10  # steps
TRAINER_STATE = "trainer_state.json"  # what the Trainer writes last into a checkpoint


@explained()
def finetune(job: FinetuneJob, out: Path, *, overwrite: bool = False, resume: bool = False) -> dict[str, float]:
    """Writes the trained model to the directory `out`; returns the results.

    Results: training_seconds (of this process), loss (mean of the last steps), with eval_data perplexity_before and
    perplexity_after, and with a teacher agreement with it before and after (see learner/model/agreement.py). What is
    measured after is of the weights that are saved. In several processes all must call this; the first writes.

    Args:
        overwrite: replace what this function wrote in `out`, and forget an interrupted run.
        resume: go on with the interrupted run of the same job, if there is one.

    Raises:
        InputError: the model, the teacher or the text cannot be used, the loss is no longer a number, `out` exists, or
            an interrupted run of another job does; or the memory is not enough, or another process has ended.
    """
    source = Path(job.model)
    geometry = check_job(job, source)
    if job.learning_rate is None:
        job = replace(job, learning_rate=default_learning_rate(geometry.hidden_size, job.lora_rank))
    place = place_of_job(job)
    with patch_environment(**{FSDP: "false"}):  # else the Trainer would shard what is sharded
        return _finetune(job, source, geometry, place, out, overwrite=overwrite, resume=resume)


def _finetune(
    job: FinetuneJob,
    source: Path,
    geometry: ModelGeometry,
    place: str,
    out: Path,
    *,
    overwrite: bool,
    resume: bool,
) -> dict[str, float]:
    arguments = _training_arguments(job, unfinished(out))
    processes, inputs, results = PartialState(), {}, {}
    show, teacher, reference = processes.is_main_process, None, None
    stored_dtype = dtype_of(read_config(source), read_headers(source))
    measured_dtype = fast_dtype(stored_dtype, arguments.device)
    if job.dtype != "auto":
        training_dtype = getattr(torch, job.dtype)
    else:
        training_dtype = measured_dtype if job.lora_rank else torch.float32
    with together(processes):
        if show:
            prepare_output(out, writer=WRITER, overwrite=overwrite)
            refuse_unfinished(out, resume=resume, overwrite=overwrite)
        inputs["model"] = str(Fingerprint.from_directory(source))
        if job.teacher:
            teacher_job = Job(model=job.teacher, method="magnitude", dtype=job.dtype)  # the method is not used
            checked = check_teacher(teacher_job, geometry, place)
            inputs["teacher"] = str(checked.fingerprint)
    with together(processes):
        if place == "sharded":
            model, tokenizer = load(source, training_dtype, loading_options(place, processes))
            model.requires_grad_(False)
        else:
            model, tokenizer = load(source, stored_dtype, {})
            model.to(arguments.device)
        check_can_be_saved(model, job.model)
        if job.teacher:
            teacher = load_dense(teacher_job, arguments.device, place, processes, checked)
            check_same_tokens(teacher, tokenizer)
    job = with_sequence_length(job, num_positions(model))
    assert job.sequence_length is not None, "with_sequence_length has filled it in"
    sequences = job.steps * job.batch_size
    blocks = training_blocks(model, tokenizer, job, job.sequence_length, sequences, teacher, processes)
    inputs["text of --data, or the tokenizer"] = blocks.digest()
    with together(processes):
        if job.eval_data:
            eval_ids = evaluation_tokens(model, tokenizer, job, show)
    if teacher is not None:
        reference = Reference.of(teacher, job.agreement_prompts, processes.print, show)

    run = unfinished_run(out, job, inputs, _last_checkpoint, processes, resume=resume, overwrite=overwrite)
    with run as directory:

        def measure(when: str) -> None:
            if job.eval_data:
                title = f"perplexity {when}"
                results[f"perplexity_{when}"] = perplexity(model, eval_ids, title=title, show_progress=show)
            if reference is not None:
                found = reference.agreement(model)
                results.update({f"{name}_{when}": found[name] for name in ("agreement_kl", "agreement_tokens")})
                results["answer_tokens"] = found["answer_tokens"]

        if place == "whole":
            cast(model, measured_dtype)
        measure("before")
        checkpoint = _last_checkpoint(directory)
        if checkpoint is not None and not job.lora_rank:
            # The Trainer itself cannot load it: names of experts in files differ from those in memory.
            model = load_pruned(checkpoint)
            check_can_be_saved(model, job.model)
        if place == "whole":
            cast(model, training_dtype)
        torch.manual_seed(job.seed)  # before LoRA is initialized
        trainer = Distillation(
            model=trainable(model, job.lora_rank),
            args=arguments,
            train_dataset=[{"input_ids": block} for block in blocks.next_batch(job.steps * job.batch_size)],
            teacher=None if teacher is None else teacher.model,
            kd_weight=job.kd_weight,
        )
        with writing():  # its checkpoints
            results["training_seconds"] = trainer.train(resume_from_checkpoint=checkpoint).metrics["train_runtime"]
        log = [row for row in trainer.state.log_history if "loss" in row]
        results["loss"] = log[-1]["loss"]

        # What is measured is rounded as what is saved.
        if place == "sharded":
            with together(processes):
                saved = merged_beside(trainer.model, source, training_dtype, job.lora_rank) if show else None
                if saved is not None:
                    cast(saved, stored_dtype)
            model = trainer.model.unload().eval()
            spread(saved, model, arguments.device)
            measure("after")
        else:
            model = merged(trainer.model).eval()
            cast(model, stored_dtype)
            cast(model, measured_dtype)
            measure("after")
            cast(model, stored_dtype)
            saved = model if show else None
        with together(processes):
            if saved is not None:
                with writing(), atomic_directory(out, writer=WRITER, overwrite=overwrite) as written:
                    _write(saved, source, written, job, results)
                    write_json(written / FINETUNING_FILE, {"job": asdict(job), "results": results, "log": log})
    return results


def _write(model: nn.Module, source: Path, directory: Path, job: FinetuneJob, results: dict[str, float]) -> None:
    """The weights of `model`, and the rest of the model directory `source`."""
    save_model(model, source, directory)
    if (source / "README.md").is_file():
        card = (source / "README.md").read_text(encoding="utf-8") + _card_section(job, results)
        (directory / "README.md").write_text(card, encoding="utf-8")


def _last_checkpoint(directory: Path) -> Path | None:
    complete = [path.parent for path in directory.glob(f"checkpoint-*/{TRAINER_STATE}")]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _training_arguments(job: FinetuneJob, directory: Path) -> TrainingArguments:
    number, micro = processes_and_micro_batch(job)
    arguments = TrainingArguments(
        output_dir=str(directory),
        num_train_epochs=1,  # the data set is as long as the run
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=job.batch_size // (micro * number),
        ddp_find_unused_parameters=True,  # an expert that no token of a process is sent to
        train_sampling_strategy="sequential",  # BlockSampler has shuffled the blocks
        learning_rate=job.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=job.steps // 20,
        gradient_checkpointing=job.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=min(LOG_EVERY, job.steps),
        save_steps=SAVE_EVERY,
        save_total_limit=1,
        seed=job.seed,
        use_cpu=job.device == "cpu",
        label_names=["input_ids"],  # the Trainer does not find it by itself in a model that PEFT wraps
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=not sys.stderr.isatty(),  # then it prints figures every LOG_EVERY steps instead
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # else the Trainer would split batches over all GPUs with nn.DataParallel
    return arguments


def _card_section(job: FinetuneJob, results: dict[str, float]) -> str:
    """What the model card says of the training."""
    trained = f"LoRA of rank {job.lora_rank}, merged" if job.lora_rank else "all weights but routers"
    loss = f"distilled from a teacher (weight {job.kd_weight:g})" if job.teacher else "on text alone"
    lines = [
        "## Fine-tuned",
        "",
        f"Trained further by finetune-pruned, {loss}: {trained}; {job.steps} steps of {job.batch_size} sequences of "
        f"{job.sequence_length} tokens; learning rate {job.learning_rate:g}.",
    ]
    if "perplexity_after" in results:
        lines.append(
            f"Perplexity in blocks of {EVAL_BLOCK_SIZE} tokens: {results['perplexity_before']:.4g} before, "
            f"{results['perplexity_after']:.4g} after."
        )
    if "agreement_kl_after" in results:
        lines.append(
            f"KL to the dense model's answers to {job.agreement_prompts} prompts: "
            f"{results['agreement_kl_before']:.3f} before, {results['agreement_kl_after']:.3f} after; tokens until "
            f"they differ: {results['agreement_tokens_before']:.1f} before, {results['agreement_tokens_after']:.1f} "
            f"after, of {results['answer_tokens']:.1f}."
        )
    return "\n".join(["", *lines, ""])
