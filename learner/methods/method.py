"""What a method of learning is given and what it gives back.

A method is a function `learn(task: Task) -> Learned`. It finds the model loaded, text as blocks of tokens, the budget,
and a journal; loading, evaluation and writing the masked checkpoint happen around it (learner/learn.py). Methods that
descend gradients have their loop in learner/run/training.py.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from learner.data.reading import BlockSampler
from learner.model.budget import Budget
from learner.model.units import Units, Values
from learner.run.journal import Journal
from pruned_vllm.common.progress import progress_bar


@dataclass(frozen=True)
class Task:
    """One learning run, as a method sees it.

    Attributes:
        model: dense causal LM of Transformers, frozen, in evaluation mode, on `accelerator.device` (in CPU memory if
            the method offloads).
        units: what may be pruned.
        budgets: what may be left, from the one that removes least to the one that removes most; one, where the method
            does not take several.
        settings: the method's own.
        seed: of everything that is drawn by lot.
        blocks: source of training batches; None for methods that read no text.
        journal: saves the state of a run and finds it again when the run is resumed; takes the log.
        accelerator: device and, where there are several, the other processes.
    """

    model: PreTrainedModel
    units: Units
    budgets: tuple[Budget, ...]
    settings: Any
    seed: int
    blocks: BlockSampler | None
    journal: Journal
    accelerator: Accelerator

    @property
    def budget(self) -> Budget:
        """The one that removes most."""
        return self.budgets[-1]

    @property
    def text(self) -> BlockSampler:
        """`blocks`, for methods that read text. Raises ValueError for others."""
        if self.blocks is None:
            raise ValueError("this method reads no text; see reads_text in learner/job.py")
        return self.blocks

    def calibration(self, title: str) -> Iterator[torch.Tensor]:
        """This process' share of the calibration text: token ids [1, length] on the device, one sequence at a time."""
        accelerator = self.accelerator
        sequences = self.text.calibration(self.settings.calibration_sequences, accelerator.print)
        share = sequences.tensor_split(accelerator.num_processes)[accelerator.process_index]
        for sequence in progress_bar(share, desc=title, unit="sequence", disable=not accelerator.is_main_process):
            yield sequence[None].to(accelerator.device)


@dataclass(frozen=True)
class Learned:
    """What a method has found.

    Attributes:
        values: for the budget that removes most, by kind, float32 [layers, units] on the CPU: what each unit is
            multiplied by; 0 is pruned.
        channel_mask_site: what the masks of channels multiply, see pruned_vllm/formats/masked.py.
        save_adapter: writes a PEFT adapter to the directory it is given; `task.model` computes with it.
        shallower: values for the budgets before the last, in the order of `task.budgets`; each keeps what the next one
            keeps, and more.
    """

    values: Values
    channel_mask_site: str = "product"
    save_adapter: Callable[[Path], None] | None = None
    shallower: tuple[Values, ...] = ()

    @classmethod
    def of_budgets(cls, values: Sequence[Values]) -> "Learned":
        """One for each budget, in their order."""
        return cls(values[-1], shallower=tuple(values[:-1]))
