"""How large a comparison of speeds this machine gets done in a given time: dtype, layers and repeats.

CPUs differ by an order of magnitude: one without AVX-512 has no fast products of bfloat16, so that what takes three
minutes elsewhere takes half an hour there. A probe of a few seconds measures products like those of the models; what
follows from its rates is a function of the rates alone.

    python -m bench.speed.budget 540     # seconds; prints the rates and the choice
"""

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

# The shape that bench.scale writes by default.
HIDDEN_SIZE, INTERMEDIATE_SIZE, VOCAB_SIZE = 1536, 4096, 32000
LAYERS = (16, 12, 8, 4)  # from the largest; with fewer layers lm_head takes a larger share, and the ideal falls
LEAST_REPEATS = 3
CASES = ("decode:1:32:64", "decode:8:32:64", "prefill:1:512")
PROMPT, STEPS, PREFILL_TOKENS = 32, 63, 512  # of these cases

START_SECONDS = 60  # of one engine, eager; and its share in what the comparison measures of the machine
RUN_SECONDS = 1.3  # around each run: until the other engine rests
LAYER_SECONDS = 6e-4  # of a layer in a step, whatever its width: norms, attention, Python
WORTH_IT = 1.2  # how much faster float32 must be to take the place of bfloat16, which models are served in

PROBE_MATRICES = 12  # together larger than a cache
PROBE_TOKENS = (1, 8, PREFILL_TOKENS)


@dataclass(frozen=True)
class Rates:
    """Products that one second does, in 10^9 weights times tokens.

    Attributes:
        one, eight: in a decode step of one sequence, and of eight.
        many: in the prefill of a long prompt.
    """

    one: float
    eight: float
    many: float


@dataclass(frozen=True)
class Choice:
    """Attributes: seconds: that the comparison will take by the rates; reason: in sentences."""

    dtype: str
    num_hidden_layers: int
    repeats: int
    seconds: float
    reason: str


def choose(rates: Mapping[str, Rates], budget: float, repeats: int, kept: float) -> Choice:
    """The largest comparison that fits into `budget` seconds, and if none does the smallest there is.

    Size goes before repeats, but there are at least LEAST_REPEATS (or `repeats`, if that is less).

    Args:
        rates: of "bfloat16" and "float32", as `measure` returns them.
        repeats: at most so many.
        kept: share of the layers' weights that the pruned model keeps.
    """
    largest = LAYERS[0]
    full = {dtype: comparison_seconds(found, largest, repeats, kept) for dtype, found in rates.items()}
    dtype = "float32" if full["bfloat16"] > WORTH_IT * full["float32"] else "bfloat16"
    least = min(LEAST_REPEATS, repeats)

    def seconds(layers: int, count: int) -> float:
        return comparison_seconds(rates[dtype], layers, count, kept)

    layers = next((layers for layers in LAYERS if seconds(layers, least) <= budget), LAYERS[-1])
    count = next((count for count in range(repeats, least, -1) if seconds(layers, count) <= budget), least)
    minutes = {name: f"{value / 60:.0f} min" for name, value in full.items()}
    reason = (
        f"The whole comparison ({largest} layers, {repeats} repeats) would take about {minutes['bfloat16']} in "
        f"bfloat16 and {minutes['float32']} in float32 on this machine; there are {budget / 60:.0f} min. "
        f"So: {dtype}, {layers} layers, {count} repeats, about {seconds(layers, count) / 60:.0f} min."
    )
    return Choice(dtype, layers, count, seconds(layers, count), reason)


def comparison_seconds(rates: Rates, layers: int, repeats: int, kept: float) -> float:
    """Of CASES on a dense model of so many layers and on a pruned one, with their starts and a warm-up run of each."""
    runs = sum(_case_seconds(rates, layers, share) + 3 * RUN_SECONDS for share in (1.0, kept))
    return 2 * START_SECONDS + (repeats + 1) * runs


def _case_seconds(rates: Rates, layers: int, share: float) -> float:
    """Of one run of each of CASES, with the prefill that a decode case begins with."""
    layer = 4 * HIDDEN_SIZE**2 + 3 * HIDDEN_SIZE * INTERMEDIATE_SIZE
    billions = (share * layers * layer + VOCAB_SIZE * HIDDEN_SIZE) / 1e9
    prefilled = PROMPT + 8 * PROMPT + PREFILL_TOKENS
    products = STEPS * billions * (1 / rates.one + 8 / rates.eight) + prefilled * billions / rates.many
    return products + 2 * STEPS * layers * LAYER_SECONDS


def measure() -> dict[str, Rates]:
    """The rates of this machine, with as many threads as vLLM's engine gets on a CPU: all cores but one."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) - 1))
    try:
        return {name: Rates(*_measure(getattr(torch, name))) for name in ("bfloat16", "float32")}
    finally:
        torch.set_num_threads(threads)


def _measure(dtype) -> list[float]:
    """For each of PROBE_TOKENS; the best of three, since others may use the machine too."""
    import torch

    weights = [torch.randn(INTERMEDIATE_SIZE, HIDDEN_SIZE).to(dtype) for _ in range(PROBE_MATRICES)]
    rates = []
    for tokens in PROBE_TOKENS:
        inputs = torch.randn(tokens, HIDDEN_SIZE).to(dtype)
        # One matrix holds enough work for many tokens; few tokens must not find their weights in a cache.
        used = weights[:1] if tokens == PREFILL_TOKENS else weights
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            for weight in used:
                torch.nn.functional.linear(inputs, weight)
            seconds.append(time.perf_counter() - started)
        rates.append(tokens * len(used) * INTERMEDIATE_SIZE * HIDDEN_SIZE / min(seconds) / 1e9)
    return rates


if __name__ == "__main__":
    found = measure()
    print(*found.items(), choose(found, float(sys.argv[1]), repeats=5, kept=0.5).reason, sep="\n")
