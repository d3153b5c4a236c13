"""What `make real` does, with which options, and how long each step takes on two quiet cores.

Steps of learning are few, so that all fits into 90 minutes on two cores: the papers take 1000 (DDP) and 8750
(MaskPrune) of far more tokens. Perplexities at 50 % show that. On a GPU take the commands from the results and learn
longer.
"""

from pruned_vllm.common.environment import cpu_features

METHODS = ("ddp", "tyr", "maskprune", "wanda", "magnitude")
SPARSITIES = (0.2, 0.5)

# On a CPU that cannot multiply bfloat16, PyTorch multiplies it slower than float32.
DTYPE = "bfloat16" if "AVX-512 BF16" in cpu_features() else "float32"
BATCH = ("--batch-size", "8", "--micro-batch-size", "8", "--sequence-length", "128")
CALIBRATION = ("--calibration-sequences", "128", "--sequence-length", "128")
# method -> options of learn-masks
OPTIONS = {
    # Within so few steps the masks must move faster than in the paper, and so must the multiplier of the budget.
    "ddp": ("--steps", "80", *BATCH, "--learning-rate", "0.1", "--lambda2-learning-rate", "6"),
    "tyr": (
        *CALIBRATION,
        *("--iterations", "2", "--generations", "6", "--offspring", "8", "--selection-tokens", "2048"),
    ),
    "maskprune": ("--steps", "60", *BATCH),
    "wanda": CALIBRATION,
    "magnitude": (),
}
RECOVERY = ("--steps", "60", *BATCH)  # options of finetune-pruned
EVAL_BLOCKS = 96  # of 128 tokens, spread over the held-out text: what perplexity is measured on
SPEED_CASES = ("decode:1:32:64", "decode:8:32:64", "prefill:1:512", "prefill:4:512")
SPEED_REPEATS = 7

CHAT_TOKENS = 48
CHAT = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Explain in one sentence what a dictionary in Python is.",
)

LEARNING_SECONDS = {"ddp": 370, "tyr": 390, "maskprune": 310, "wanda": 30, "magnitude": 15}
SECONDS = {"model": 60, "text": 10, "convert": 10, "know": 55, "serve": 65, "recover": 280, "speed": 400}


def names() -> list[str]:
    """Of the pruned models: "ddp-20"."""
    return [f"{method}-{percent(sparsity)}" for method in METHODS for sparsity in SPARSITIES]


def recovered_names() -> list[str]:
    return [f"recovered-{percent(sparsity)}" for sparsity in SPARSITIES]


def percent(sparsity: float) -> str:
    return f"{100 * sparsity:.0f}"


def planned() -> dict[str, float]:
    """All steps in their order, and seconds on two quiet cores with AVX-512."""
    steps: dict[str, float] = {"model": SECONDS["model"], "text": SECONDS["text"]}
    steps |= {f"{step}-dense": SECONDS[step] for step in ("know", "serve")}
    for name in names():
        steps[f"learn-{name}"] = LEARNING_SECONDS[name.partition("-")[0]]
        steps |= {f"{step}-{name}": SECONDS[step] for step in ("convert", "know", "serve")}
    for share in map(percent, SPARSITIES):
        steps[f"recover-{share}"] = SECONDS["recover"]
        steps |= {f"{step}-recovered-{share}": SECONDS[step] for step in ("know", "serve")}
    steps |= {f"speed-{percent(sparsity)}": SECONDS["speed"] for sparsity in SPARSITIES}
    return steps
