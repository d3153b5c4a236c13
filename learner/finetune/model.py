"""The models of a fine-tuning run: how they are loaded, and what of the pruned one is trained."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from learner.data.prompts import GENERATION_PROMPTS
from learner.job import Job
from learner.model.dense import CheckedModel, DenseModel, check_dense
from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.hf.loading import load_pruned

LORA_ALPHA = 32  # at any rank: then the best learning rate hardly depends on the rank
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
        lora_alpha=LORA_ALPHA,
        target_modules="all-linear",  # PEFT leaves out lm_head
        target_parameters=fused or None,
    )
    # For model types with experts, PEFT counts routers among "all-linear" and finds fused experts only. For Llama not.
    model.config.model_type = "llama"
    try:
        return get_peft_model(model, lora)
    finally:
        del model.config.model_type  # the instance's; the class still has the real one


def load(
    source: Path, dtype: torch.dtype, options: Mapping[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The pruned model in evaluation mode, and its tokenizer; `options` are for from_pretrained."""
    try:
        return load_pruned(source, dtype=dtype, **options).eval(), AutoTokenizer.from_pretrained(source)
    except InputError:
        raise
    except Exception as error:  # damaged models raise many kinds
        raise InputError(f"{source} cannot be loaded: {type(error).__name__}: {error}") from error


def check_teacher(teacher: Job, pupil: ModelGeometry, place: str) -> CheckedModel:
    """The dense model of the job `teacher`, as far as it is known before its weights are read.

    Raises InputError if it cannot be loaded to `place`, or has other tokens than the pruned model.
    """
    checked = check_dense(teacher, place)
    known = checked.geometry.vocab_size
    if known != pupil.vocab_size:
        raise InputError(
            f"the teacher {teacher.model} has {known} tokens, the pruned model {pupil.vocab_size}; it must be the "
            "model that was pruned, or one with the same tokenizer"
        )
    return checked


def check_same_tokens(teacher: DenseModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises InputError if the tokenizer of the pruned model makes other tokens of text than the teacher's, whose
    predictions would be for those. Special tokens may have other names: chat models add theirs."""
    prompts = list(GENERATION_PROMPTS)
    ours, theirs = (found(prompts, add_special_tokens=False)["input_ids"] for found in (tokenizer, teacher.tokenizer))
    for prompt, our, their in zip(prompts, ours, theirs, strict=True):
        if our != their:
            raise InputError(
                f"of {prompt!r} the teacher's tokenizer makes tokens {_some(their)}, that of the pruned model "
                f"{_some(our)}; the teacher must be the model that was pruned, or one with the same tokenizer"
            )


def _some(tokens: list[int]) -> str:
    return " ".join(map(str, tokens[:8])) + (" ..." if len(tokens) > 8 else "")


def merged(model: nn.Module) -> PreTrainedModel:
    """What `trainable` returned, trained, without its LoRA, which is added to the weights."""
    return model.merge_and_unload(progressbar=True) if isinstance(model, PeftModel) else model


def merged_beside(model: PeftModel, source: Path, dtype: torch.dtype, rank: int) -> PreTrainedModel:
    """What `merged` would return if `model`, loaded from `source`, were not sharded; on the CPU, in `dtype`."""
    plain = load_pruned(source, dtype=dtype).eval()
    plain.generation_config = GenerationConfig()  # as `check_can_be_saved` has left that of `model`
    whole = trainable(plain, rank)
    learned = {name: parameter.cpu() for name, parameter in model.named_parameters() if parameter.requires_grad}
    whole.load_state_dict(learned, strict=False)
    return merged(whole)


@torch.no_grad()
def spread(whole: PreTrainedModel | None, model: PreTrainedModel, device: torch.device) -> None:
    """Gives the sharded `model` the weights of `whole`, which the first process has; the others call it with None."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor), f"{name} is not sharded"
        known = torch.empty(parameter.shape) if whole is None else whole.get_parameter(name)
        part = distribute_tensor(known.to(device, parameter.dtype), parameter.device_mesh, parameter.placements)
        parameter.to_local().copy_(part.to_local())
