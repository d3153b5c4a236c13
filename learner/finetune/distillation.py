"""The Trainer of fine-tuning, whose loss never holds all logits at once; see learner/model/loss.py."""

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, Trainer

from learner.model.loss import Teacher, next_token_loss, run_without_head
from pruned_vllm.common.errors import InputError


class Distillation(Trainer):
    """CE, and with a teacher CE + kd_weight * KL(teacher || model), of token ids "input_ids"."""

    loss_is_scaled_for_ga = False  # the loss is the mean over a micro batch

    def __init__(self, *, teacher: PreTrainedModel | None, kd_weight: float, **kwargs) -> None:
        super().__init__(**kwargs)
        self._teacher, self._kd_weight = teacher, kd_weight

    def compute_loss(self, model: nn.Module, inputs: dict[str, torch.Tensor], *args, **kwargs) -> torch.Tensor:
        tokens = inputs["input_ids"]
        pruned = self.accelerator.unwrap_model(model)
        pruned = pruned.get_base_model() if isinstance(pruned, PeftModel) else pruned
        # Through `model`, which adds up gradients of several processes.
        hidden, teacher = run_without_head(pruned, tokens, model).last_hidden_state, None
        if self._teacher is not None:
            with torch.no_grad():
                wanted = run_without_head(self._teacher, tokens).last_hidden_state
            teacher = Teacher(self._teacher, wanted, self._kd_weight)
        loss = next_token_loss(pruned, tokens, hidden, teacher)
        if not loss.isfinite():
            raise InputError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}; lower --learning-rate, use --dtype "
                "bfloat16 or float32, or a --sequence-length of at least 2"
            )
        return loss
