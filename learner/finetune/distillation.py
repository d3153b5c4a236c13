"""The Trainer of fine-tuning, whose loss never holds all logits at once; see learner/model/loss.py.

The Trainer knows models whose weights from_pretrained has sharded over processes, with LoRA that each process holds,
but adds up gradients one by one, as they are made: in another order where an expert is sent no token in one of the
processes, so that the gradients of one expert would be added to those of another. Here that waits for the whole step.
It also refuses to save states of such a run, since those of sharded weights would be parts; LoRA's are whole.
"""

from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from learner.model.loss import Teacher, next_token_loss, run_without_head
from pruned_vllm.common.errors import InputError


class Distillation(Trainer):
    """CE, and with a teacher CE + kd_weight * KL(teacher || model), of token ids "input_ids"."""

    loss_is_scaled_for_ga = False  # the loss is the mean over a micro batch

    def __init__(
        self, *, args: TrainingArguments, teacher: PreTrainedModel | None, kd_weight: float, **kwargs: Any
    ) -> None:
        args.save_only_model = True
        super().__init__(args=args, **kwargs)
        args.save_only_model = False
        self._teacher, self._kd_weight = teacher, kd_weight
        self._replicated: list[nn.Parameter] = []  # LoRA's weights, if those beside it are sharded

    def _sync_replicated_trainable_parameters(self, model: nn.Module) -> None:
        self._replicated = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if self._replicated:  # told what to save, PEFT does not gather what is sharded
            state_dict = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        super()._save(output_dir, state_dict)

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            self._average_gradients()
        return loss

    def _average_gradients(self) -> None:
        """Those that no process has stay None, so that AdamW leaves their weights where they are."""
        if not self._replicated:
            return
        has_one = [float(parameter.grad is not None) for parameter in self._replicated]
        having = self.accelerator.reduce(torch.tensor(has_one, device=self.args.device))
        for parameter, number in zip(self._replicated, having.tolist(), strict=True):
            if number:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.accelerator.reduce(gradient, reduction="mean")

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
