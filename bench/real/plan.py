"""What `make real` does with each model, with which options, and how long each step takes on two quiet cores.

Steps of learning are few, so that all fits into 90 minutes on two cores, or 40 for Gemma 3: the papers take 1000 (DDP)
and 8750 (MaskPrune) of far more tokens. Perplexities at 50 % show that. On a GPU take the commands from the results and
learn longer.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from pruned_vllm.common.environment import multiplies_fast

# On a CPU that cannot multiply bfloat16, PyTorch multiplies it slower than float32.
DTYPE = "bfloat16" if multiplies_fast("bfloat16") else "float32"
CALIBRATION = ("--calibration-sequences", "128", "--sequence-length", "128")
EVAL_BLOCKS = 96  # of 128 tokens, spread over the held-out text: what perplexity is measured on
SPEED_CASES = ("decode:1:32:64", "decode:8:32:64", "prefill:1:512", "prefill:4:512")
SPEED_REPEATS = 7
ANSWER_TOKENS = 48  # at most, to each of the prompts


@dataclass(frozen=True)
class Learning:
    """Attributes: options: of learn-masks or finetune-pruned; seconds: on two quiet cores with AVX-512."""

    options: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What is done with a model.

    Attributes:
        directory: that `make` has it write to; stands for it in results.
        methods: of learn-masks, in their order.
        sparsities: that each removes.
        recovery: by finetune-pruned, of the best of each sparsity.
        prompts: what every served model is asked in a chat; texts to go on with for one without a chat template.
        seconds: of every other kind of step.
        eval_blocks: see EVAL_BLOCKS.
    """

    directory: str
    methods: Mapping[str, Learning]
    sparsities: tuple[float, ...]
    recovery: Learning
    prompts: tuple[str, ...]
    seconds: Mapping[str, float]
    eval_blocks: int = EVAL_BLOCKS

    def names(self) -> list[str]:
        """Of the pruned models: "ddp-20"."""
        return [f"{method}-{percent(sparsity)}" for method in self.methods for sparsity in self.sparsities]

    def recovered_names(self) -> list[str]:
        return [f"recovered-{percent(sparsity)}" for sparsity in self.sparsities]

    def steps(self) -> dict[str, float]:
        """All of them in their order, and seconds."""
        seconds = self.seconds
        steps: dict[str, float] = {"model": seconds["model"], "text": seconds["text"]}
        steps |= {f"{step}-dense": seconds[step] for step in ("know", "serve")}
        for name in self.names():
            steps[f"learn-{name}"] = self.methods[name.partition("-")[0]].seconds
            steps |= {f"{step}-{name}": seconds[step] for step in ("convert", "know", "serve")}
        for share in map(percent, self.sparsities):
            steps[f"recover-{share}"] = self.recovery.seconds
            steps |= {f"{step}-recovered-{share}": seconds[step] for step in ("know", "serve")}
        steps |= {f"speed-{percent(sparsity)}": seconds["speed"] for sparsity in self.sparsities}
        return steps


def percent(sparsity: float) -> str:
    return f"{100 * sparsity:.0f}"


def _batch(sequences: int) -> tuple[str, ...]:
    return ("--batch-size", str(sequences), "--micro-batch-size", str(sequences), "--sequence-length", "128")


def _ddp(sequences: int) -> tuple[str, ...]:
    """Within so few steps the masks must move faster than in the paper, and so must the multiplier of the budget."""
    return ("--steps", "80", *_batch(sequences), "--learning-rate", "0.1", "--lambda2-learning-rate", "6")


# model -> what is done with it
PLANS = {
    "smollm2": Plan(
        directory="real",
        methods={
            "ddp": Learning(_ddp(8), 370),
            "tyr": Learning(
                (
                    *CALIBRATION,
                    *("--iterations", "2", "--generations", "6", "--offspring", "8", "--selection-tokens", "2048"),
                ),
                390,
            ),
            "maskprune": Learning(("--steps", "60", *_batch(8)), 310),
            "wanda": Learning(CALIBRATION, 30),
            "magnitude": Learning((), 15),
        },
        sparsities=(0.2, 0.5),
        recovery=Learning(("--steps", "60", "--learning-rate", "2e-4", *_batch(8)), 280),
        prompts=(
            "What is the capital of France?",
            "Write one sentence about the sea.",
            "Explain in one sentence what a dictionary in Python is.",
        ),
        seconds={"model": 60, "text": 10, "convert": 10, "know": 55, "serve": 65, "speed": 400},
    ),
    # Its vocabulary makes a token cost as much as three of SmolLM2: fewer of them.
    "gemma3": Plan(
        directory="real-gemma3",
        methods={"ddp": Learning(_ddp(4), 450), "wanda": Learning(CALIBRATION, 60)},
        sparsities=(0.2,),
        recovery=Learning(("--steps", "60", "--learning-rate", "2e-4", *_batch(4)), 400),
        prompts=("The capital of France is", "The sea is", "In Python, a dictionary is"),
        seconds={"model": 120, "text": 10, "convert": 10, "know": 90, "serve": 80, "speed": 450},
        eval_blocks=32,
    ),
}
