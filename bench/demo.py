"""Everything once: train a small model, learn masks, convert, serve over the OpenAI API, compare with the dense model.

    make demo            # or: python -m bench.demo [--output-dir demo]

Each step is the public command that a user would type, and is printed. The small model proves that the served model
is the masked one; it is too small to show a speedup (overheads fill its time), so the comparison runs on a shape of
about 0.5 billion parameters with random weights and the learned pattern of widths scaled up. On a slow machine its
dtype, its layers and the repeats are chosen so that the demo ends within about 15 minutes; it says what and why.
"""

import argparse
import sys
import time
from pathlib import Path

from rich.table import Table

from bench.commands import console, run, script
from bench.served_text import served_perplexity
from bench.speed import budget
from bench.speed.server import served
from pruned_vllm.common.arguments import fraction, positive_int
from pruned_vllm.common.command import run_command
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import read_json, write_json

BUDGET_SECONDS = 15 * 60  # of the whole demo
LEAST_SPEED_SECONDS = 4 * 60  # of it for the comparison, however long the steps before took
SERVED_NAME = "pico-llama-pruned"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path("demo"),
        help="an earlier demo in it is replaced, your own files stay; default: demo",
    )
    parser.add_argument(
        "--sparsity", type=fraction, default=0.5, help="share of heads and channels to remove; default: 0.5"
    )
    parser.add_argument(
        "--repeats", type=positive_int, default=5, help="paired runs of each speed case, at most; default: 5"
    )
    args = parser.parse_args(argv)
    return run_command(parser.prog, lambda: demo(args.output_dir, args.sparsity, args.repeats))


def demo(output_dir: Path, sparsity: float, repeats: int) -> None:
    """Runs the demo. Raises InputError when a step fails or a result is not what it must be."""
    output_dir.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()

    heading("1. A small Llama, trained on the English that ships with Python")
    run(sys.executable, "-m", "bench.pico", "llama")
    from transformers import AutoTokenizer

    from bench.pico import pico_model
    from learner.data.reading import tokenize_files

    model = pico_model("llama")

    heading("2. Learn masks: DDP, and two baselines of the same budget")
    text, heldout = model / "train.txt", model / "heldout.txt"
    learn = [script("learn-masks"), "--overwrite", model]
    removed = ["--sparsity", sparsity, "--eval-data", heldout]
    # The paper takes 1000 steps. To meet the budget within 300, its multiplier must grow faster.
    small = ["--steps", 300, "--batch-size", 8, "--sequence-length", 128, "--lambda2-learning-rate", 1.6]
    run(*learn, output_dir / "ckpt", *removed, "--data", text, *small)
    for method in ("magnitude", "random"):
        run(*learn, output_dir / f"ckpt-{method}", *removed, "--method", method)

    heading("3. Convert: fold the masks into the weights, cut out what they remove")
    run(script("convert-pruned"), output_dir / "ckpt", output_dir / "out", "--overwrite")

    heading("4. Serve it: vllm serve, asked through the OpenAI client")
    heldout_ids = tokenize_files(AutoTokenizer.from_pretrained(model), [heldout]).tolist()
    with served(output_dir / "out", output_dir / "server.log", SERVED_NAME) as client:
        prompt = "The built-in function open() returns a file object and"
        answer = client.completions.create(model=SERVED_NAME, prompt=prompt, max_tokens=40, temperature=0)
        console.print(f"[bold]{prompt}[/bold]{answer.choices[0].text}")
        converted = served_perplexity(client, SERVED_NAME, heldout_ids)

    heading("5. Perplexity on held-out text: the served model is the masked model")
    results = {name: learning_results(output_dir / f"ckpt{name}") for name in ("", "-magnitude", "-random")}
    unigram = read_json(model / "pico.json")["unigram_perplexity"]
    masked = results[""]["masked_perplexity"]
    table = Table("model", "perplexity", "heads removed", "channels removed")
    rows: list[tuple[str, float, dict | None]] = [
        ("unigram frequencies", unigram, None),
        ("dense", results[""]["dense_perplexity"], None),
    ]
    rows += [("masked by DDP (Hugging Face)", masked, results[""]), ("converted (vLLM)", converted, results[""])]
    rows += [(f"masked by {name[1:]}", results[name]["masked_perplexity"], results[name]) for name in list(results)[1:]]
    for name, value, learned in rows:
        shares = [f"{learned[kind]:.1%}" if learned else "" for kind in ("head_sparsity", "channel_sparsity")]
        table.add_row(name, f"{value:.3f}", *shares)
    console.print(table)
    write_json(output_dir / "perplexity.json", {name: value for name, value, _ in rows})
    if abs(converted / masked - 1) > 1e-3:
        raise InputError(f"the converted model's perplexity {converted:.4f} is not the masked model's {masked:.4f}")

    heading("6. Speed: the learned widths in a larger shape, random weights, against the dense shape")
    left = max(BUDGET_SECONDS - (time.monotonic() - started), LEAST_SPEED_SECONDS)
    compare_speed(output_dir, budget.choose(budget.measure(), left, repeats, kept=1 - sparsity))


def compare_speed(output_dir: Path, choice: budget.Choice) -> None:
    """The converted model's pattern of widths at the chosen size, against the dense model of that size."""
    console.print(choice.reason)
    layers = ["--num-hidden-layers", choice.num_hidden_layers]
    run(sys.executable, "-m", "bench.scale", output_dir / "out", output_dir / "scaled", *layers)
    directories = ["--dense", output_dir / "scaled" / "dense", "--pruned", output_dir / "scaled" / "pruned"]
    options = ["--load-format", "dummy", "--eager", "--dtype", choice.dtype, "--repeats", choice.repeats]
    options += ["--output-dir", output_dir / "results", "--cases", *budget.CASES]
    run(sys.executable, "-m", "bench.e2e_speedup", *directories, *options)


def heading(text: str) -> None:
    console.rule(f"[bold]{text}", align="left")


def learning_results(checkpoint: Path) -> dict:
    return read_json(checkpoint / "learning.json")["results"]


if __name__ == "__main__":
    sys.exit(main())
