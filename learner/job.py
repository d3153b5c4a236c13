"""The options of a learning run, and the table of methods. The command line is made from both. Pure Python.

To add a method, write one row of METHODS, one dataclass of settings in learner/settings.py, and one module with a
function `learn`; learner/methods/method.py says what the function takes and returns.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from learner.settings import (
    MAY_CHANGE,
    CalibrationSettings,
    DDPSettings,
    MaskPruneSettings,
    NoSettings,
    ReapSettings,
    TyrSettings,
    WandaSettings,
)
from learner.targets import DEFAULT_CASE, Target
from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.ideal import Case
from pruned_vllm.formats.masked import MASK_KEYS

QUERY_HEADS = ("independent", "tied")
COST_MEASURES = ("parameters", "bytes", "speedup")
# Where the weights are: on every device; a part on each process' device; layers on the devices of one process; in CPU
# memory, from which each layer comes to the device when it is computed.
PLACES = ("whole", "sharded", "spread", "offloaded")
SELF_TOKENS = 2**17
AGREEMENT_PROMPTS = 50


@dataclass(frozen=True)
class Method:
    """A row of METHODS.

    Attributes:
        module: has `learn(task: Task) -> Learned`, as "module" or "module:function".
        settings: dataclass of its options.
        summary: one line of help.
        reads_text: whether it learns from --data.
        query_heads: which of QUERY_HEADS it supports; the first is its default.
        offloads: whether the model waits in CPU memory and the method brings to the device what it needs there.
        changes_weights: whether the model has other weights in the end, which the checkpoint must hold.
        takes_remote_code: whether it prunes models whose code comes with the checkpoint; see
            learner/model/remote_code.py.
        kinds: the units that it prunes; others stay as they are.
        takes_several_targets: whether a run may have several budgets.
        places: of PLACES, where the weights of the dense model may be.
        drops_experts: whether experts without channels are meant to go with their rows of the router, which
            convert-pruned --drop-empty-experts does.
    """

    module: str
    settings: type
    summary: str
    reads_text: bool = True
    query_heads: tuple[str, ...] = QUERY_HEADS
    offloads: bool = False
    changes_weights: bool = False
    takes_remote_code: bool = True
    kinds: tuple[str, ...] = tuple(MASK_KEYS)
    takes_several_targets: bool = True
    places: tuple[str, ...] = ("whole", "spread")
    drops_experts: bool = False


METHODS = {
    "ddp": Method(
        "learner.methods.ddp",
        DDPSettings,
        "Deterministic Differentiable Pruning, arXiv 2603.08065",
        places=PLACES,
    ),
    "maskprune": Method(
        "learner.methods.maskprune.learn",
        MaskPruneSettings,
        "MaskPrune, arXiv 2502.14008: uniform widths",
        query_heads=("tied",),
        takes_several_targets=False,
        places=("whole", "sharded", "spread"),
    ),
    "tyr": Method(
        "learner.methods.tyr.learn",
        TyrSettings,
        "Tyr-the-Pruner, arXiv 2503.09657",
        offloads=True,
        changes_weights=True,
        takes_remote_code=False,
        takes_several_targets=False,
        places=("whole",),
    ),
    "wanda": Method("learner.methods.wanda", WandaSettings, "keeps units whose weights and activations are large"),
    "flap": Method("learner.methods.flap", CalibrationSettings, "keeps units that vary much, FLAP, arXiv 2312.11983"),
    "taylor": Method(
        "learner.methods.taylor",
        CalibrationSettings,
        "keeps units that the loss depends on, as LLM-Pruner, arXiv 2305.11627",
        takes_remote_code=False,
    ),
    "depth": Method(
        "learner.methods.depth",
        CalibrationSettings,
        "removes whole layers, those that change their input least, as ShortGPT, arXiv 2403.03853",
        takes_remote_code=False,
    ),
    "reap": Method(
        "learner.methods.reap",
        ReapSettings,
        "REAP, arXiv 2510.13999: removes whole experts, those of small weighted outputs",
        takes_remote_code=False,
        kinds=("expert",),
        drops_experts=True,
    ),
    "magnitude": Method(
        "learner.methods.baselines:magnitude", NoSettings, "keeps the units with the largest weights", reads_text=False
    ),
    "random": Method("learner.methods.baselines:random", NoSettings, "keeps units at random", reads_text=False),
}


@dataclass(frozen=True)
class Job:
    """What to learn on what.

    Attributes:
        model: directory or hub id of the dense model.
        method: a name of METHODS.
        settings: an instance of the method's settings; None takes its defaults.
        sparsity: share of the query heads, of the FFN channels of dense MLPs, and of the channels of routed experts, to
            remove; several for a checkpoint each. None is 0.5 where there is no other target.
        head_sparsity: in place of `sparsity` for the heads; None is the same, 0 learns no masks of heads.
        target_parameters, target_bytes, target_speedup: in place of `sparsity`, what the whole model must come down to;
            one budget in which all kinds of units compete. One of these, one or several values.
        at: the case of the ideal speedup, see `pruned_vllm.formats.ideal.Case`.
        query_heads: "independent" or "tied": whether the query heads of a KV head go one by one, or all together with
            their KV head; None is the method's default. The same in multi-head attention.
        data, eval_data: what to learn from, and what to measure perplexity on; see learner/data/reading.py. "self" in
            `data` is text of the model's own, see learner/data/self_generated.py.
        self_tokens: of that text at most; a run that reads more reads them again.
        agreement_prompts: on how many prompts agreement with the dense model is measured, see
            learner/model/agreement.py; 0 measures none.
        text_column, split: where data sets have their text.
        device: torch device; "auto" is a GPU if there is one.
        weights: one of PLACES; None is "sharded" where accelerate is set up for FSDP, and else "whole".
        dtype: of the weights while learning; "auto" is as stored, but float32 on a CPU that multiplies 16 bits slower.
            Masks are float32.
        trust_remote_code: run the model's own code, for architectures that Transformers lacks.
        seed: of initialization and data order.
        revision: commit, branch or tag of a model of the hub; None is its main branch.
    """

    model: str
    method: str = "ddp"
    settings: Any = None
    sparsity: float | Sequence[float] | None = None
    head_sparsity: float | None = None
    target_parameters: Sequence[float] = ()
    target_bytes: Sequence[float] = ()
    target_speedup: Sequence[float] = ()
    at: str = DEFAULT_CASE
    query_heads: str | None = None
    data: list[str] = field(default_factory=list)
    eval_data: list[str] = field(default_factory=list)
    self_tokens: int = SELF_TOKENS
    agreement_prompts: int = AGREEMENT_PROMPTS
    text_column: str = "text"
    split: str = "train"
    device: str = field(default="auto", metadata=MAY_CHANGE)
    weights: str | None = field(default=None, metadata=MAY_CHANGE)
    dtype: str = "auto"
    trust_remote_code: bool = False
    seed: int = 42
    revision: str | None = None

    def __post_init__(self) -> None:
        """Raises InputError where the method does not exist or is told what it cannot do."""
        if self.method not in METHODS:
            raise InputError(f"method {self.method!r} is unknown; choose one of {', '.join(METHODS)}")
        method = METHODS[self.method]
        if self.settings is None:
            object.__setattr__(self, "settings", method.settings())
        elif type(self.settings) is not method.settings:
            raise InputError(f"{self.method} takes {method.settings.__name__}, not {type(self.settings).__name__}")
        if self.query_heads is None:
            object.__setattr__(self, "query_heads", method.query_heads[0])
        elif self.query_heads not in method.query_heads:
            raise InputError(f"{self.method} cannot prune with --query-heads {self.query_heads}")
        if self.weights not in (None, *method.places):
            raise InputError(
                f"{self.method} cannot learn with --weights {self.weights}; it can with {', '.join(method.places)}"
            )
        settings: Any = self.settings
        if self.weights == "offloaded" and not settings.gradient_checkpointing:
            raise InputError(
                "--weights offloaded needs --gradient-checkpointing too: without it every layer stays on the device "
                "from the forward pass to the backward pass"
            )
        if method.reads_text and not self.data:
            raise InputError(f"{self.method} learns from text; say from which with --data")
        self._check_targets()

    def _check_targets(self) -> None:
        measures = [name for name in COST_MEASURES if getattr(self, f"target_{name}")]
        if self.sparsity is None and not measures:
            object.__setattr__(self, "sparsity", 0.5)
        elif isinstance(self.sparsity, Sequence) and len(self.sparsity) == 1:
            object.__setattr__(self, "sparsity", self.sparsity[0])  # so that a run may be resumed in other words
        given = ["--sparsity"] * (self.sparsity is not None) + [f"--target-{name}" for name in measures]
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)} are different budgets; give one of them")
        if measures and self.head_sparsity:
            raise InputError(
                f"{given[0]} is one budget for all units, so heads have no share of their own; leave out "
                "--head-sparsity, or keep all heads with --head-sparsity 0"
            )
        try:
            Case.parse(self.at)
        except ValueError as error:
            raise InputError(f"--at: {error}") from error
        names = [target.name for target in self.targets]
        if len(set(names)) < len(names):
            raise InputError(f"{given[0]} {' '.join(names)}: give each value once")
        by = getattr(self.settings, "budget", "global")
        if measures and by != "global":
            raise InputError(
                f"{given[0]} is one budget for the whole model, but --budget {by} removes the same share of every "
                f"{by}; say --budget global"
            )
        if len(names) > getattr(self.settings, "steps", len(names)):
            raise InputError(
                f"--steps {self.settings.steps} are too few for {len(names)} budgets, which take a share of them each"
            )
        if len(names) > 1 and not METHODS[self.method].takes_several_targets:
            raise InputError(
                f"{self.method} learns weights for one budget, so a run has one; give one value of {given[0]}, and "
                "start a run for each"
            )

    @property
    def targets(self) -> tuple[Target, ...]:
        """From the one that removes least to the one that removes most."""
        values: dict[str, Any] = {"sparsity": () if self.sparsity is None else self.sparsity}
        values |= {name: getattr(self, f"target_{name}") for name in COST_MEASURES}
        targets = [
            Target(measure, value)
            for measure, given in values.items()
            for value in (given if isinstance(given, Sequence) else (given,))
        ]
        return tuple(sorted(targets, key=lambda target: target.removal))
