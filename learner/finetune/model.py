"""The models of a fine-tuning run: how they are loaded, and what of the pruned one is trained."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from learner.job import Job
from learner.model.dense import load_dense
from learner.model.saving import without_generation_config
from pruned_vllm.common.errors import InputError
from pruned_vllm.hf.loading import load_pruned

ROUTER = "mlp.gate.weight"  # in all families, as Transformers names it


def trainable(model: nn.Module, rank: int) -> nn.Module:
    """`model` with LoRA of this rank, or with all weights but its routers to be trained."""
    if not rank:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.endswith(ROUTER))
        return model
    # Experts of one width are no modules in Transformers but two parameters.
    names = {name.rpartition("mlp.experts.")[2] for name, _ in model.named_parameters() if "mlp.experts." in name}
    fused = [f"mlp.experts.{name}" for name in ("gate_up_proj", "down_proj") if name in names]
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",  # but lm_head
        target_parameters=fused or None,
    )
    # For model types that have experts, PEFT takes "all-linear" for routers too and looks for fused experts only.
    model.config.model_type = "llama"
    try:
        return get_peft_model(model, lora)
    finally:
        del model.config.model_type  # of the instance; the class has the real one


def load(source: Path) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The pruned model in the dtype that it is stored in, in evaluation mode, and its tokenizer."""
    try:
        model = without_generation_config(load_pruned(source, dtype="auto").eval())
        return model, AutoTokenizer.from_pretrained(source)
    except InputError:
        raise
    except Exception as error:  # damaged models end in almost any exception
        raise InputError(f"{source} cannot be loaded: {type(error).__name__}: {error}") from error


def load_teacher(name: str, pupil: nn.Module, device: torch.device) -> nn.Module:
    """The frozen dense model `name` (directory or hub id) on `device`."""
    teacher, _, _ = load_dense(Job(model=name, method="magnitude"), device)  # the method is not used
    if teacher.config.vocab_size != pupil.config.vocab_size:
        raise InputError(
            f"the teacher {name} has {teacher.config.vocab_size} tokens, the pruned model {pupil.config.vocab_size}; "
            "it must be the model that was pruned, or one with the same tokenizer"
        )
    return teacher


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Not `model.to(dtype)`, which would round the frequencies of rotary embeddings too."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
