"""The options of the methods, a dataclass for each, from which the command line is made. Pure Python.

An option that several methods have means the same in all of them, but may have other defaults.
"""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.masked import CHANNEL_MASK_SITES

BUDGETS = ("global", "layer", "expert")
GATES = ("relu", "deterministic-hard-concrete", "hard-concrete")
LORA_TARGETS = ("all", "query-value")
RESOURCES = ("kind", "model")
ERROR_ACCUMULATIONS = ("expectation", "none")
MAY_CHANGE = {"may_change": True}  # metadata of a field that says how a run computes, not what: --resume takes another
SEQUENCE_LENGTH_HELP = "tokens in a sequence; the default is less for models with fewer positions"


def option(
    default: Any,
    text: str,
    *,
    choices: tuple[str, ...] | None = None,
    shown: str | None = None,
    zero: bool = False,
    may_change: bool = False,
) -> Any:
    """A field that `learn-masks` offers: its help, the values it may have, and how the default is shown.

    Numbers must be above 0, or, with `zero`, at least 0. What `may_change` may be another when a run is resumed.
    """
    metadata = {"help": text, "choices": choices, "shown": shown, "zero": zero}
    return field(default=default, metadata=metadata | (MAY_CHANGE if may_change else {}))


def with_sequence_length(settings: Any, positions: int | None) -> Any:
    """`settings` with a sequence length: if none was asked for, the default, but not more than the model's positions.

    Args:
        settings: a dataclass; one without `sequence_length` is returned as it is.
        positions: that the model was made for; None if its config does not say.
    """
    if getattr(settings, "sequence_length", 0) is not None:
        return settings
    length = settings.default_sequence_length
    return replace(settings, sequence_length=min(length, positions or length))


@dataclass(frozen=True)
class TrainingSettings:
    """Of methods that learn by gradients."""

    steps: int = option(1000, "optimizer steps")
    batch_size: int = option(16, "sequences in a step, on all devices together")
    micro_batch_size: int = option(
        16, "sequences in one forward pass on one device; lower it to save memory", may_change=True
    )
    sequence_length: int | None = option(None, SEQUENCE_LENGTH_HELP, shown="2048")
    default_sequence_length: ClassVar[int] = 2048
    gradient_checkpointing: bool = option(
        False, "compute activations again in the backward pass: less memory, more time", may_change=True
    )

    @property
    def sequences(self) -> int:
        """How many sequences a run reads."""
        return self.steps * self.batch_size


@dataclass(frozen=True)
class DDPSettings(TrainingSettings):
    """Defaults of arXiv 2603.08065."""

    learning_rate: float = option(2e-2, "learning rate of the masks (ddp: of their parameters z)")
    lambda_learning_rate: float = option(
        2e-2, "learning rate of lambda1 and lambda3, the penalties for missing the budget and for undecided masks"
    )
    lambda2_learning_rate: float = option(
        0.8, "learning rate of lambda2, the penalty for the squared distance to the budget"
    )
    settle: float = option(
        0.3,
        "share of the run, at its end, in which the smallest masks fade until the budget is met, and the others then "
        "settle; 0, as in the paper, cuts off what is beyond the budget after the last step",
        zero=True,
    )
    warmup_steps: int | None = option(None, "linear warm-up before the cosine decay", shown="a tenth of --steps")
    mu_start: float = option(
        0.5,
        "mask value that counts as half a unit when the units left are counted, at the first step; "
        "falls until the last",
    )
    mu_end: float = option(0.05, "the same at the last step")
    kd_weight: float = option(2.0, "weight of the distillation loss; 0 learns without a teacher", zero=True)
    kd_temperature: float = option(1.0, "temperature of the distillation loss")
    budget: str = option(
        "global",
        "what loses the share that --sparsity says: the whole model, every layer by itself, or every expert by itself",
        choices=BUDGETS,
    )
    gate: str = option(
        "relu", "how masks are computed from their parameters; all but relu are the paper's baselines", choices=GATES
    )

    def __post_init__(self) -> None:
        if self.settle > 1:
            raise InputError(f"--settle {self.settle:g} is a share of the run; it must be at most 1")


@dataclass(frozen=True)
class MaskPruneSettings(TrainingSettings):
    """Defaults of arXiv 2502.14008 where it has any; see learner/methods/maskprune/learn.py for the others."""

    steps: int = option(8750, "optimizer steps")
    sequence_length: int | None = option(None, SEQUENCE_LENGTH_HELP, shown="512")
    default_sequence_length: ClassVar[int] = 512
    learning_rate: float = option(1e-2, "learning rate of the masks")
    lora_learning_rate: float = option(1e-3, "learning rate of the adapter")
    lora_rank: int = option(8, "rank of the adapter; 0 learns masks only", zero=True)
    lora_alpha: float = option(8.0, "alpha of the adapter, whose product is scaled by alpha / rank")
    lora_targets: str = option(
        "all", "projections with an adapter: all of attention and dense MLPs, or q and v", choices=LORA_TARGETS
    )
    layer_weight: float = option(
        0.1,
        "weight of the distance between the hidden states of the pruned and the dense model (alpha in the paper)",
        zero=True,
    )
    prox_interval: int = option(10, "steps between proximal steps of the channels at the start; falls to 1")
    decay: float = option(0.5, "eta1 of the proximal step, which divides masks by 1 + 2 eta1 y")
    s_rate: float = option(2.0, "eta2, learning rate of s, the share of each row to remove; over the whole run")
    y_rate: float = option(10.0, "eta3, learning rate of y, the multiplier of the masks; over the whole run")
    z_rate: float = option(8.0, "eta4, learning rate of z, the multiplier of the parameters; over the whole run")
    multiplier_start: float = option(0.1, "y and z at the start")
    resource: str = option(
        "kind", "what has a budget of parameters: each kind of unit, or the model", choices=RESOURCES
    )
    channel_mask_site: str = option(
        "product",
        "what the masks of channels multiply: act(gate) * up, or both projections before the activation",
        choices=CHANNEL_MASK_SITES,
    )


@dataclass(frozen=True)
class CalibrationSettings:
    """Of methods that run text through the model, but learn nothing by gradients."""

    calibration_sequences: int = option(128, "sequences on which activations are measured")
    sequence_length: int | None = option(None, SEQUENCE_LENGTH_HELP, shown="2048")
    default_sequence_length: ClassVar[int] = 2048

    @property
    def sequences(self) -> int:
        """How many sequences a run reads."""
        return self.calibration_sequences


@dataclass(frozen=True)
class WandaSettings(CalibrationSettings):
    """Sizes of the calibration text as in arXiv 2306.11695."""


@dataclass(frozen=True)
class ReapSettings(CalibrationSettings):
    """The paper removes as many experts from each layer (arXiv 2510.13999)."""

    budget: str = option(
        "layer", "what loses the share that --sparsity says: the whole model, or every layer by itself", choices=BUDGETS
    )

    def __post_init__(self) -> None:
        if self.budget == "expert":
            raise InputError("reap removes whole experts, so none can lose a share; --budget must be global or layer")


@dataclass(frozen=True)
class TyrSettings(CalibrationSettings):
    """Defaults of arXiv 2503.09657; selection draws from the calibration text too."""

    calibration_sequences: int = option(1024, "sequences on which activations are measured")
    sequence_length: int | None = option(None, SEQUENCE_LENGTH_HELP, shown="4096")
    default_sequence_length: ClassVar[int] = 4096
    iterations: int = option(
        4,
        "how often candidates are made and searched, each time in steps half as large; 0 prunes all layers alike",
        zero=True,
    )
    generations: int = option(50, "generations of each search")
    offspring: int = option(128, "children in a generation")
    selection_tokens: int = option(
        131072, "tokens that the last stage of selection reads; the stages before it read 1/64 and 1/8 of that"
    )
    error_accumulation: str = option(
        "expectation",
        "inputs that later layers are pruned for: with the mean error of all candidates for the "
        "layers before, or those of the dense model",
        choices=ERROR_ACCUMULATIONS,
    )


@dataclass(frozen=True)
class NoSettings:
    """Of methods that need none."""
