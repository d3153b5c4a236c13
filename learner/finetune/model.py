"""The models of a fine-tuning run: how they are loaded, and what of the pruned one is trained."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from learner.job import Job
from learner.model.dense import DenseModel, load_dense
from pruned_vllm.common.errors import InputError
from pruned_vllm.hf.loading import load_pruned

# As Transformers names it in all families, and in gpt-oss.
ROUTER = ("mlp.gate.weight", "mlp.router.weight", "mlp.router.bias")


def trainable(model: PreTrainedModel, rank: int) -> nn.Module:
    """`model` with LoRA of this rank, or with all weights but its routers to be trained."""
    if not rank:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.endswith(ROUTER))
        return model
    # Transformers holds experts of one width in two parameters, not in modules.
    names = {name.rpartition("mlp.experts.")[2] for name, _ in model.named_parameters() if "mlp.experts." in name}
    fused = [f"mlp.experts.{name}" for name in ("gate_up_proj", "down_proj") if name in names]
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",  # PEFT leaves out lm_head
        target_parameters=fused or None,
    )
    # For model types with experts, PEFT counts routers among "all-linear" and finds fused experts only. For Llama not.
    model.config.model_type = "llama"
    try:
        return get_peft_model(model, lora)
    finally:
        del model.config.model_type  # the instance's; the class still has the real one


def load(source: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The pruned model in the dtype that it is stored in, in evaluation mode, and its tokenizer."""
    try:
        return load_pruned(source, dtype="auto").eval(), AutoTokenizer.from_pretrained(source)
    except InputError:
        raise
    except Exception as error:  # damaged models raise many kinds
        raise InputError(f"{source} cannot be loaded: {type(error).__name__}: {error}") from error


def load_teacher(name: str, pupil: PreTrainedModel, device: torch.device, dtype: str) -> DenseModel:
    """The dense model `name` (directory or hub id) on `device`, in `dtype` ("auto": as it is stored)."""
    teacher = load_dense(Job(model=name, method="magnitude", dtype=dtype), device)  # the method is not used
    if teacher.model.config.vocab_size != pupil.config.vocab_size:
        raise InputError(
            f"the teacher {name} has {teacher.model.config.vocab_size} tokens, the pruned model "
            f"{pupil.config.vocab_size}; it must be the model that was pruned, or one with the same tokenizer"
        )
    return teacher
