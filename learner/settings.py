"""What a learning run can be told; the command line takes its defaults from here. Pure Python."""

from dataclasses import dataclass, field
from pathlib import Path

METHODS = ("ddp", "magnitude", "random")
BUDGETS = ("global", "layer", "expert")


@dataclass(frozen=True)
class DDPSettings:
    """Hyper-parameters of DDP; the defaults are the paper's.

    Attributes:
        steps: optimizer steps of `batch_size` sequences.
        micro_batch_size: sequences in one forward pass; the gradient is that of the whole batch.
        sequence_length: tokens in a sequence.
        learning_rate: of z. lambda_learning_rate: of lambda1 and lambda3. lambda2_learning_rate: of lambda2.
        warmup_steps: linear warm-up, then cosine to 0, of all learning rates; None is a tenth of the steps.
        mu_start, mu_end: the mask value whose retention is 0.5, at the first and the last step.
        kd_weight: eta, 0 learns without a teacher. kd_temperature: of both softmaxes.
        budget: one of BUDGETS: what meets the sparsity by itself: all units of a kind together, those of each layer, or
            those of each expert (heads and channels of dense MLPs: of each layer).
    """

    steps: int = 1000
    batch_size: int = 16
    micro_batch_size: int = 16
    sequence_length: int = 2048
    learning_rate: float = 2e-2
    lambda_learning_rate: float = 2e-2
    lambda2_learning_rate: float = 0.8
    warmup_steps: int | None = None
    mu_start: float = 0.5
    mu_end: float = 0.05
    kd_weight: float = 2.0
    kd_temperature: float = 1.0
    budget: str = "global"


@dataclass(frozen=True)
class Job:
    """What to learn on what.

    Attributes:
        model: directory or hub id of the dense model.
        method: one of METHODS.
        sparsity: share of the KV heads (with all their query heads), of the FFN channels of dense MLPs, and of the
            channels of routed experts, to remove.
        head_sparsity: in place of `sparsity` for the KV heads; None is the same, 0 learns no masks of heads.
        data, eval_data: UTF-8 text files to learn from, and to measure perplexity on.
        device: torch device; "auto" is a GPU if there is one.
        dtype: of the weights while learning ("auto": as stored); masks are float32.
        seed: of initialization and data order.
    """

    model: str
    method: str = "ddp"
    sparsity: float = 0.5
    head_sparsity: float | None = None
    data: list[Path] = field(default_factory=list)
    eval_data: list[Path] = field(default_factory=list)
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 42
    ddp: DDPSettings = DDPSettings()

    def sparsity_of(self, kind: str) -> float:
        """Share of the units of this kind ("head", "channel" or "expert") to remove."""
        return self.sparsity if kind != "head" or self.head_sparsity is None else self.head_sparsity
