"""Times steps of the methods that learn by gradients, against the least that their arithmetic takes.

    python -m bench.learning_speed                           # models with random weights, dense and with experts
    python -m bench.learning_speed --model DIR --tokens 16x512 --dtypes bfloat16

On a GPU the models are larger, and in bfloat16, so that its arithmetic counts and not the time to launch kernels.

A step runs the teacher forward, the student forward, and the student backward through its inputs; weights are frozen,
so nothing is computed for them. Each of the three multiplies as often as one forward pass. `share_of_bound` is the time
of three forward passes without gradients, of the same tokens and with all logits, divided by that of a step; it cannot
reach 1, since attention goes back through two products for each of its own, and losses, masks and norms cost something
too. Forward passes and steps take turns in rounds; figures are medians over rounds.
"""

import argparse
import itertools
import json
import shlex
import sys
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from bench.resident import forget_peak, peak_bytes
from bench.speed.results import describe_hardware, describe_versions
from pruned_vllm.common.arguments import positive_int
from pruned_vllm.common.command import run_command

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# config.json of SmolLM2-135M, and of a Qwen3-MoE. lm_head is a fifth and a third of their arithmetic; it is less in
# large models, and with it what a loss costs.
SHAPES: dict[str, dict[str, Any]] = {
    "dense": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "experts": {
        "model_type": "qwen3_moe",
        "hidden_size": 512,
        "moe_intermediate_size": 256,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 16,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 32768,
        "tie_word_embeddings": True,
    },
}
# For a GPU: Llama 3.1 8B, and 16 of the 48 layers of Qwen3-30B-A3B.
LARGE_SHAPES: dict[str, dict[str, Any]] = {
    "llama-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "qwen3-moe-10b": {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
    },
}
METHODS = ("ddp", "maskprune")
DTYPES = ("float32", "bfloat16")
WARM_UP = 1  # steps and forward passes of a round that are not timed


def measure(
    model: "PreTrainedModel", device: "torch.device", method: str, tokens: tuple[int, int], rounds: int, steps: int
) -> dict:
    """Seconds of a forward pass and of a step, tokens a second, and the share of the bound.

    Args:
        model: frozen, on `device`.
        tokens: sequences in a step, all in one micro batch, and their length.
        steps: that are timed in a round, and forward passes.
    """
    import torch

    forward, step = [], []
    batch = torch.randint(model.config.vocab_size, tokens, generator=torch.Generator().manual_seed(0)).to(device)
    is_cuda = device.type == "cuda"
    torch.cuda.reset_peak_memory_stats() if is_cuda else forget_peak()
    for _ in range(rounds):
        forward.append(median(_forward_seconds(model, batch, steps + WARM_UP)[WARM_UP:]))
        step.append(median(_step_seconds(model, method, tokens, steps + WARM_UP)[WARM_UP:]))
    return {
        "method": method,
        "sequences": tokens[0],
        "sequence_length": tokens[1],
        "forward_s": median(forward),
        "step_s": median(step),
        "tokens_per_s": batch.numel() / median(step),
        "share_of_bound": median(3 * f / s for f, s in zip(forward, step, strict=True)),
        "peak_bytes": torch.cuda.max_memory_allocated() if is_cuda else peak_bytes(),
        "samples_s": {"forward": forward, "step": step},
    }


def _forward_seconds(model: "PreTrainedModel", batch: "torch.Tensor", number: int) -> list[float]:
    import torch

    clock = _Clock()
    with torch.no_grad():
        for _ in range(number):
            model(input_ids=batch, use_cache=False)
            clock.tick()
    return clock.seconds


def _step_seconds(model: "PreTrainedModel", method: str, tokens: tuple[int, int], steps: int) -> list[float]:
    import importlib

    import torch
    from accelerate import Accelerator

    from learner.data.reading import BlockSampler
    from learner.job import METHODS as ROWS
    from learner.methods.method import Task
    from learner.model.budget import UnitBudget
    from learner.model.units import Units
    from learner.run.journal import Journal
    from learner.targets import Target
    from pruned_vllm.formats.geometry import ModelGeometry

    clock = _Clock()

    class Timed(Journal):
        """Every step is logged when it has ended."""

        def log(self, step: int, values: dict[str, float]) -> None:
            clock.tick()

    row, (sequences, length) = ROWS[method], tokens
    units = Units.from_geometry(
        ModelGeometry.from_config(model.config.to_dict() | {"architectures": [type(model).__name__]}),
        tied=row.query_heads[0] == "tied",
    )
    # Without an adapter: LoRA's own arithmetic is none of the three passes, and PEFT would stay in the model.
    more = {"lora_rank": 0} if method == "maskprune" else {}
    settings = row.settings(
        steps=steps, batch_size=sequences, micro_batch_size=sequences, sequence_length=length, **more
    )
    text = torch.randint(model.config.vocab_size, (sequences * length * 2,), generator=torch.Generator().manual_seed(1))
    accelerator = Accelerator(cpu=model.device.type == "cpu")
    budget = UnitBudget(Target("sparsity", 0.5), units, dict.fromkeys(units.layers, 0.5))
    clock.tick()
    importlib.import_module(row.module).learn(
        Task(model, units, (budget,), settings, 0, BlockSampler(text, length, 0), Timed(), accelerator)
    )
    return clock.seconds[1:]


class _Clock:
    """Seconds between ticks, when the device has done what it was given."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = time.perf_counter()

    def tick(self) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now


def _model(name: str, dtype: str, device: "torch.device") -> "PreTrainedModel":
    """The model of that shape, or what is there."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shapes = SHAPES | LARGE_SHAPES
    if name not in shapes:
        return AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype)).to(device)
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**shapes[name]), dtype=getattr(torch, dtype))


def _run(args: argparse.Namespace) -> None:
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    large = device.type == "cuda"
    results: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "bench.learning_speed", *sys.argv[1:]]),
        "threads": torch.get_num_threads(),
        "hardware": describe_hardware(torch.cuda.get_device_name() if large else "cpu"),
        "versions": describe_versions(),
        "runs": [],
    }
    names = [args.model] if args.model else list(LARGE_SHAPES if large else SHAPES)
    tokens = args.tokens or ((4, 2048) if large else (2, 256))
    for name, dtype in itertools.product(names, args.dtypes or (("bfloat16",) if large else DTYPES)):
        model = _model(name, dtype, device).requires_grad_(False).eval()
        for method in args.methods:
            found = measure(model, device, method, tokens, args.rounds, args.steps)
            results["runs"].append({"model": name, "dtype": dtype, **found})
            print(
                f"{name:<15}{dtype:<10}{method:<10} {found['tokens_per_s']:>10.0f} tokens/s, "
                f"{found['share_of_bound']:.2f} of the bound, peak {found['peak_bytes'] / 1e9:.2f} GB",
                flush=True,
            )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path = args.output_dir / "learning_speed.json"
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"written: {path}")


def _tokens(text: str) -> tuple[int, int]:
    sequences, _, length = text.partition("x")
    if not (sequences.isdecimal() and length.isdecimal() and int(sequences) and int(length) > 1):
        raise argparse.ArgumentTypeError(f"{text!r} is not sequences x length, such as 8x256")
    return int(sequences), int(length)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.learning_speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--model",
        metavar="DIR",
        help=f"{', '.join(SHAPES | LARGE_SHAPES)}, with random weights; or a directory or hub id; default: see above",
    )
    add("--methods", nargs="+", choices=METHODS, default=METHODS, help="default: all")
    add("--tokens", type=_tokens, metavar="NxL", help="of a step; default: 2x256, on a GPU 4x2048")
    add("--dtypes", nargs="+", choices=DTYPES, help="default: all, on a GPU bfloat16")
    add("--rounds", type=positive_int, default=3, help="default: 3")
    add("--steps", type=positive_int, default=3, help="that are timed in a round; default: 3")
    add("--output-dir", type=Path, default=Path("results"), metavar="DIR", help="created; default: results")
    args = parser.parse_args()
    return run_command(parser.prog, lambda: _run(args))


if __name__ == "__main__":
    sys.exit(main())
