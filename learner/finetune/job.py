"""What a fine-tuning run is to do, and whether it can be done; learner/finetune/finetune.py does it."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
import transformers
from accelerate.utils import parse_flag_from_env
from transformers import Trainer

from learner.job import AGREEMENT_PROMPTS, MAY_CHANGE, SELF_TOKENS
from learner.model.placement import check_sharding_on
from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.companions import find_companions
from pruned_vllm.formats.config import read_config
from pruned_vllm.formats.geometry import ModelGeometry

# By the variable that `accelerate launch` sets.
FSDP = "ACCELERATE_USE_FSDP"
SHARDING = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}


@dataclass(frozen=True)
class FinetuneJob:
    """What to train on what.

    Attributes:
        model: directory of the converted model.
        data, eval_data: what to learn from, and what to measure perplexity on before and after; see
            learner/data/reading.py. "self" in `data` is text that the teacher writes, see
            learner/data/self_generated.py.
        self_tokens: of that text at most; a run that reads more reads them again.
        agreement_prompts: on how many prompts agreement with the teacher is measured, before and after, see
            learner/model/agreement.py; 0 measures none.
        text_column, split: where data sets have their text.
        teacher: dense model (directory or hub id) to be distilled from; None learns from the text alone.
        kd_weight: of the teacher's part in the loss, CE + kd_weight * KL(teacher || model).
        steps: optimizer steps.
        batch_size, micro_batch_size: sequences in a step of all processes together, and in a forward pass of one.
        sequence_length: tokens in a sequence; None is 2048, or the model's positions if they are fewer.
        learning_rate: at its peak; None is `default_learning_rate`.
        lora_rank: 0 trains all weights.
        gradient_checkpointing: recompute activations in the backward pass.
        device: "cuda" is the first GPU; "auto" is that if there is one, else "cpu".
        weights: "whole" or "sharded" over the processes; None is "sharded" where accelerate is set up for FSDP, and
            else "whole".
        dtype: of the weights while training, the teacher's too, and where they are sharded also while measuring; "auto"
            is as stored, but float32 for all weights that are trained, and on a CPU that multiplies 16 bits slower.
        seed: of data order and LoRA's initialization.
    """

    model: str
    data: list[str]
    eval_data: list[str] = field(default_factory=list)
    self_tokens: int = SELF_TOKENS
    agreement_prompts: int = AGREEMENT_PROMPTS
    text_column: str = "text"
    split: str = "train"
    teacher: str | None = None
    kd_weight: float = 2.0
    steps: int = 300
    batch_size: int = 16
    micro_batch_size: int = 16
    sequence_length: int | None = None
    default_sequence_length: ClassVar[int] = 2048
    learning_rate: float | None = None
    lora_rank: int = 16
    gradient_checkpointing: bool = False
    device: str = "auto"
    weights: str | None = field(default=None, metadata=MAY_CHANGE)
    dtype: str = "auto"
    seed: int = 42


def default_learning_rate(hidden_size: int, lora_rank: int) -> float:
    """For LoRA of alpha 32 and any rank 5e-4 (2000 / hidden_size)^0.781, as sweeps over Llama models of 1B to 70B found
    (https://thinkingmachines.ai/blog/lora and its cookbook), and a tenth of that for all weights. Qwen's best rate
    depends less on the size there. The law is not followed to hidden sizes below 512.
    """
    of_lora = 5e-4 * (2000 / max(hidden_size, 512)) ** 0.781
    return float(f"{of_lora if lora_rank else of_lora / 10:.2g}")


def check_job(job: FinetuneJob, source: Path) -> ModelGeometry:
    """The geometry of the model in `source`. Refuses what can be refused before anything is loaded."""
    config = read_config(source)
    geometry = ModelGeometry.from_config(config)
    if "pruning" not in config:
        raise InputError(f"{source} was not written by convert-pruned: its config.json says nothing of pruning")
    if "quantization_config" in config:
        raise InputError(f"{source} is quantized; train the model that it was made from, and quantize the result")
    if not hasattr(transformers, geometry.family.architecture):
        raise InputError(
            f"Transformers has no {geometry.family.architecture}, and code from a checkpoint is never run, so {source} "
            "cannot be trained; vLLM serves it"
        )
    find_companions(source)  # what cannot be copied is refused now
    if job.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch finds no GPU here; take --device cpu")
    for flag, name in SHARDING.items():
        if parse_flag_from_env(flag):
            raise InputError(
                f"accelerate is set up for {name}; finetune-pruned shards weights with FSDP: choose that in "
                "`accelerate config`, or multi-GPU"
            )
    number, micro = processes_and_micro_batch(job)
    if job.batch_size % (number * micro):
        of_processes = f" times the {number} processes" if number > 1 else ""
        raise InputError(
            f"--batch-size {job.batch_size} is no multiple of --micro-batch-size {micro}{of_processes}; choose one"
        )
    return geometry


def place_of_job(job: FinetuneJob) -> str:
    """Where the weights are; see `FinetuneJob.weights`. Raises InputError where they cannot be there."""
    place = job.weights or ("sharded" if parse_flag_from_env(FSDP) else "whole")
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return "whole"  # so that a run of several processes can be resumed by one
    if place != "sharded":
        return place
    if not job.lora_rank:
        raise InputError(
            "--lora-rank 0 trains all weights, and those cannot be sharded; take LoRA, or --weights whole with "
            "--gradient-checkpointing and --micro-batch-size 1 to save memory"
        )
    if not hasattr(Trainer, "_sync_replicated_trainable_parameters"):
        raise InputError(
            f"Transformers {transformers.__version__} does not train what it has sharded; install 5.19 or later, or "
            "take --weights whole"
        )
    if parse_flag_from_env("FSDP_OFFLOAD_PARAMS"):
        raise InputError("finetune-pruned does not offload weights to the CPU; choose FSDP without that")
    check_sharding_on(job.device)
    return place


def processes_and_micro_batch(job: FinetuneJob) -> tuple[int, int]:
    """How many processes share a batch, and how many sequences go through the model of one at once."""
    number = int(os.environ.get("WORLD_SIZE", 1))
    return number, min(job.micro_batch_size, max(1, job.batch_size // number))
