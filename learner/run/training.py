"""The loop of methods that learn by gradients: batches, devices, progress, and a state to resume from.

    training = Training(task, parameters, {"z": z, "optimizer": optimizer})
    for step in training.steps():
        loss = training.backward(masks_of, loss_of)   # gradients of the mean over the batch, on every device
        optimizer.step()

Several processes (`accelerate launch -m learner.cli ...`) share each batch. What is learned is small, so every process
holds all of it, adds up the gradients and takes the same step.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from learner.methods.method import Task
from learner.model.masking import apply_masks
from learner.model.remote_code import brings_code
from learner.run.processes import together
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.progress import progress_bar

SAVE_EVERY = 50  # steps
FLOAT16_TOKENS = 512  # of the mean loss over so many tokens, gradients still fit float16


class Training:
    """A run of `task.settings.steps` steps.

    Args:
        task: with settings that are TrainingSettings.
        parameters: what `backward` makes gradients of.
        state: by name, all that changes from step to step: tensors, and what has state_dict and load_state_dict. A
            generator of random numbers is not saved, so make one in every step, from the seed and the step.
    """

    def __init__(self, task: Task, parameters: Iterable[nn.Parameter], state: dict[str, Any]) -> None:
        self.task, self.settings = task, task.settings
        self._parameters = list(parameters)
        self._state = state
        if self.settings.gradient_checkpointing:
            task.model.gradient_checkpointing_enable({"use_reentrant": False})
        # Transformers recomputes activations in training mode only. Code that a checkpoint brings may compute gradients
        # in training mode only (DeepSeekMoE's experts). Other models stay in evaluation mode: no dropout, no noise.
        if self.settings.gradient_checkpointing or brings_code(task.model):
            task.model.train()
        self._progress: Any = None  # the bar, while `steps` runs
        self._step = 0

    def steps(self) -> Iterator[int]:
        """Counts the steps that are left, shows their progress, and saves the state after every SAVE_EVERY."""
        task, start = self.task, self._restore()
        for _ in range(start):
            task.text.next_batch(self.settings.batch_size)
        with progress_bar(
            total=self.settings.steps,
            initial=start,
            desc=type(self.settings).__name__.removesuffix("Settings").lower(),
            unit="step",
            disable=not task.accelerator.is_main_process,
        ) as self._progress:
            for step in range(start, self.settings.steps):
                self._step = step
                yield step
                self._progress.update()
                if (step + 1) % SAVE_EVERY == 0 or step + 1 == self.settings.steps:
                    with together(task.accelerator):
                        state = {name: _state_of(value) for name, value in self._state.items()}
                        task.journal.save({"step": step + 1, **state})

    def backward(
        self,
        masks_of: Callable[[], Mapping[str, torch.Tensor]],
        loss_of: Callable[[torch.Tensor, Any], torch.Tensor],
        teacher_of: Callable[[torch.Tensor], Any] | None = None,
        channel_mask_site: str = "product",
    ) -> float:
        """Takes the next batch, adds the gradients of its mean loss, and returns that loss.

        Args:
            masks_of: masks under the keys of pruning_masks.safetensors, made anew for every forward pass.
            loss_of: mean loss of token ids [sequences, length], given also what `teacher_of` returned; the model that
                it calls is masked, until the backward pass is over.
            teacher_of: runs before, without masks and gradients.
            channel_mask_site: see `apply_masks`.

        Raises:
            InputError: the loss is no longer a number.
        """
        settings, accelerator = self.settings, self.task.accelerator
        batch = self.task.text.next_batch(settings.batch_size)
        if settings.batch_size < accelerator.num_processes:
            raise InputError(
                f"--batch-size {settings.batch_size} is less than the {accelerator.num_processes} processes"
            )
        total, scale = torch.zeros((), device=accelerator.device), self._gradient_scale(batch.numel())
        for micro_batch, weight in self._micro_batches(batch):
            teacher = None
            if teacher_of is not None:
                with torch.no_grad():
                    teacher = teacher_of(micro_batch)
            with apply_masks(self.task.model, masks_of(), channel_mask_site):
                loss = loss_of(micro_batch, teacher) * weight
                (loss * scale).backward()
            total += loss.detach().to(total.device)
        total = accelerator.reduce(total).item()
        if not math.isfinite(total):
            raise InputError(
                f"the loss is {total} at step {self._step + 1}; use --dtype bfloat16 or float32, "
                "a lower --learning-rate, or a --sequence-length of at least 2"
            )
        for parameter in self._parameters:
            if scale > 1 and parameter.grad is not None:
                parameter.grad /= scale
            if accelerator.num_processes > 1:
                parameter.grad = accelerator.reduce(parameter.grad)
        return total

    def _micro_batches(self, batch: torch.Tensor) -> Iterator[tuple[torch.Tensor, float]]:
        """This process' share of the batch, in parts, with the weight of each part's mean loss.

        Where weights are sharded, processes run the model together, so all have as many parts; those that would have
        fewer repeat a sequence with weight 0.
        """
        settings, accelerator = self.settings, self.task.accelerator
        shares = batch.tensor_split(accelerator.num_processes)
        share = shares[accelerator.process_index].to(accelerator.device)
        parts = list(share.split(settings.micro_batch_size))
        for part in parts:
            yield part, len(part) / len(batch)
        if isinstance(self.task.model, FSDPModule):
            for _ in range(len(parts), math.ceil(len(shares[0]) / settings.micro_batch_size)):
                yield share[:1], 0.0

    def _gradient_scale(self, num_tokens: int) -> int:
        """What to multiply a batch's loss by for the backward pass: a power of two, exact to undo.

        The larger the batch, the smaller are gradients of its mean loss; float16 rounds those below 6e-8 to zero.
        """
        if self.task.model.dtype != torch.float16:
            return 1
        return 1 << (max(1, num_tokens // FLOAT16_TOKENS).bit_length() - 1)

    def report(self, step: int, **figures: float) -> None:
        """Shows figures of a step beside the progress and logs them."""
        self._progress.set_postfix({name: f"{value:.3f}" for name, value in figures.items()})
        self.task.journal.log(step + 1, figures)

    def _restore(self) -> int:
        saved = self.task.journal.restore()
        if saved is None:
            return 0
        for name, kept in self._state.items():
            if isinstance(kept, torch.Tensor):
                with torch.no_grad():
                    kept.copy_(saved[name])
            else:
                kept.load_state_dict(saved[name])
        return saved["step"]


def _state_of(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value.state_dict()
