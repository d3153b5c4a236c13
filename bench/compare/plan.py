"""What `make compare` measures: pruned models by name, with the options that make them.

    ddp-20                    a method at a budget, learned from foreign text
    ddp-20-self               the same from text that the dense model wrote; -mixed: half of each
    ddp-20-mixed-1000k        learned from so many tokens, as in the paper
    recovered-20-self-250k    ddp-20-mixed, trained back on so many tokens of such text; -131k, -524k: more of it is
                              written, so that less is read again; -full: all weights are trained, not LoRA's;
                              -long: of ddp-20-mixed-1000k

Budgets are shares of heads and channels, the same for every method, so sizes are equal but for rounding: to whole
heads and layers, and because a KV head stays until all its query heads are gone. The table says the size of each.
"""

from dataclasses import dataclass

from bench.real.plan import CALIBRATION, DTYPE, EVAL_BLOCKS, PLANS, Learning

BUDGETS = {"20": ("--sparsity", "0.2"), "50": ("--sparsity", "0.5")}
METHODS = {
    **PLANS["smollm2"].methods,
    "flap": Learning(CALIBRATION, 30),
    "taylor": Learning(CALIBRATION, 60),
    "depth": Learning(CALIBRATION, 30),
    "random": Learning((), 15),
}
READS_NO_TEXT = ("magnitude", "random")
DATA = {"text": ("text",), "self": ("self",), "mixed": ("text", "self")}
SELF_TOKENS = "40960"  # what half of DDP's steps read; writing takes longer than reading, so recovery reads them again
MORE_SELF_TOKENS = "131072"  # the default of the commands
MOST_SELF_TOKENS = "524288"  # half of a million, so that nothing of "mixed" is read twice; for a GPU
STUDIED = ("ddp", "20")  # what the study of data and recovery is made on
BATCH = ("--batch-size", "8", "--micro-batch-size", "8", "--sequence-length", "128")
TOKENS_A_STEP = 8 * 128
TOKENS = {"250k": 250_000, "1000k": 1_000_000}
RECOVERED_FROM = "ddp-20-mixed"
LONG = "1000k"  # that DDP learns from; with as many of recovery two millions

ANSWERED = ("Name three colors.", "What is the capital of France?", "Write one sentence about the sea.")
SPEED_CASES = ("decode:1:32:64", "decode:8:32:64")
SPEED_REPEATS = 7

LEARNING_SECONDS_A_TOKEN = 1.5e-2
RECOVERY_SECONDS_A_TOKEN = 5e-3
WRITING_SECONDS_A_TOKEN = 3e-2
SECONDS = {"model": 60, "text": 10, "convert": 10, "know": 90, "speed": 240}
EVALUATION = {"eval_blocks": EVAL_BLOCKS, "answered": list(ANSWERED)}


@dataclass(frozen=True)
class Variant:
    """A pruned model.

    Attributes:
        name: see the top of this file.
        command: "learn" or "recover".
        options: of learn-masks or finetune-pruned.
        data: a key of DATA; "" reads no text.
        source: the variant that is trained back; "" for those that are learned.
        timed: whether its speed is measured: training back changes no size.
        seconds: that `command` takes on two quiet cores.
        self_tokens: of text that the dense model writes.
    """

    name: str
    command: str
    options: tuple[str, ...]
    data: str
    source: str = ""
    timed: bool = True
    seconds: float = 0.0
    self_tokens: str = SELF_TOKENS

    @property
    def for_gpu(self) -> bool:
        """Whether two CPU cores would take hours for it."""
        return self.self_tokens == MOST_SELF_TOKENS


def variants() -> dict[str, Variant]:
    """All of them by name, what others build on first."""
    found = [_learned(method, budget) for budget in BUDGETS for method in METHODS]
    found += [_learned(*STUDIED, data=data) for data in DATA if data != "text"]
    found += [_recovered(data, "250k") for data in DATA]
    found.append(_recovered("mixed", "250k", "-131k", self_tokens=MORE_SELF_TOKENS))
    found += [_recovered(data, "1000k") for data in ("self", "mixed")]
    found.append(_recovered("mixed", "1000k", "-full", ("--lora-rank", "0")))
    long = _learned_long()
    found += [long, _recovered("mixed", "250k", "-524k-long", self_tokens=MOST_SELF_TOKENS, source=long.name)]
    for how, options in (("", ()), ("-full", ("--lora-rank", "0"))):
        for source, suffix in ((RECOVERED_FROM, ""), (long.name, "-long")):
            name, written = f"-524k{how}{suffix}", MOST_SELF_TOKENS
            found += [_recovered(data, "1000k", name, options, written, source) for data in ("self", "mixed")]
    return {variant.name: variant for variant in found}


def place(device: str) -> tuple[str, ...]:
    """Options of the commands: on a GPU in float32, too, so that its figures compare with those of a CPU."""
    return ("--device", device, "--dtype", DTYPE if device == "cpu" else "float32")


def _steps(tokens: str) -> tuple[str, ...]:
    return ("--steps", str(TOKENS[tokens] // TOKENS_A_STEP), *BATCH)


def _learned_long() -> Variant:
    """With the paper's rates, which are made for so many steps."""
    method, budget = STUDIED
    return Variant(
        name=f"{method}-{budget}-mixed-{LONG}",
        command="learn",
        options=("--method", method, *BUDGETS[budget], *_steps(LONG)),
        data="mixed",
        timed=False,
        seconds=TOKENS[LONG] * LEARNING_SECONDS_A_TOKEN + int(MOST_SELF_TOKENS) * WRITING_SECONDS_A_TOKEN,
        self_tokens=MOST_SELF_TOKENS,
    )


def _learned(method: str, budget: str, data: str = "text") -> Variant:
    options = ("--method", method, *BUDGETS[budget], *METHODS[method].options)
    return Variant(
        name=f"{method}-{budget}" + ("" if data == "text" else f"-{data}"),
        command="learn",
        options=options,
        data="" if method in READS_NO_TEXT else data,
        timed=data == "text",
        seconds=METHODS[method].seconds,
    )


def _recovered(
    data: str,
    tokens: str,
    how: str = "",
    options: tuple[str, ...] = (),
    self_tokens: str = SELF_TOKENS,
    source: str = RECOVERED_FROM,
) -> Variant:
    count = TOKENS[tokens]
    return Variant(
        name=f"recovered-{STUDIED[1]}-{data}-{tokens}{how}",
        command="recover",
        options=(*_steps(tokens), *options),
        data=data,
        source=source,
        timed=False,
        seconds=count * RECOVERY_SECONDS_A_TOKEN + (int(self_tokens) - int(SELF_TOKENS)) * WRITING_SECONDS_A_TOKEN,
        self_tokens=self_tokens,
    )


def chosen(only: list[str], device: str = "cpu") -> dict[str, Variant]:
    """The variants of these names and those that they are made from; without names all that are for this device.

    Raises:
        KeyError: for a name that there is not.
    """
    every = variants()
    names = set(only or [name for name, variant in every.items() if device != "cpu" or not variant.for_gpu])
    names |= {every[name].source for name in names} - {""}
    if unknown := names - every.keys():
        raise KeyError(", ".join(sorted(unknown)))
    return {name: variant for name, variant in every.items() if name in names}


def planned(models: dict[str, Variant], *, timed: bool = True) -> dict[str, float]:
    """All steps in their order, and seconds on two quiet cores; those that time decoding only if `timed`."""
    steps: dict[str, float] = {"model": SECONDS["model"], "text": SECONDS["text"], "know-dense": SECONDS["know"]}
    for name, variant in models.items():
        steps[f"{variant.command}-{name}"] = variant.seconds
        if variant.command == "learn":
            steps[f"convert-{name}"] = SECONDS["convert"]
        steps[f"know-{name}"] = SECONDS["know"]
        if variant.timed and timed:
            steps[f"speed-{name}"] = SECONDS["speed"]
    return steps
