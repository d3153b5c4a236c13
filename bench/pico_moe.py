"""What pruning experts costs on the Qwen3-MoE pico model: channels of experts, or whole ones at as many bytes.

    python -m bench.pico_moe --output-dir bench/results/cpu_pico_moe

Removes 20, 40 and 60 % of the experts' channels (heads stay), with one budget for all experts of the model
(`learn-masks --budget global`) and with the same budget in each expert (`--budget expert`), as the granularity
ablation of the DDP paper does (arXiv 2603.08065). REAP removes as many whole experts with their rows of the router, the
same number in each layer or the worst of the model (`--method reap`). Prints tables and writes to --output-dir:

- pico_moe.json: settings, perplexities on held-out text, the width of every expert, the router's load
- global_20.safetensors and so on: masks that the global budget led to (first seed), each a pruning_masks.safetensors
"""

import argparse
import itertools
import platform
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from pruned_vllm.common.command import run_command
from pruned_vllm.common.files import read_json, write_json
from pruned_vllm.formats.masked import MASKS_FILE, layer_masks

SPARSITIES = (0.2, 0.4, 0.6)
BUDGETS = {"ddp": ("global", "expert"), "reap": ("layer", "global")}  # by method
# The paper takes 1000 steps. To meet the budget within 300, its multiplier must grow faster.
SETTINGS: dict[str, Any] = {
    "steps": 300,
    "batch_size": 8,
    "micro_batch_size": 8,
    "sequence_length": 128,
    "lambda2_learning_rate": 1.6,
}
CALIBRATION: dict[str, Any] = {"calibration_sequences": 128, "sequence_length": 128}  # of REAP
RESULTS_FILE = "pico_moe.json"
console = Console(highlight=False)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.pico_moe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output-dir", type=Path, required=True, help=f"gets masks and {RESULTS_FILE}, in place of earlier ones"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[42], metavar="N", help="of DDP; default: 42")
    args = parser.parse_args(argv)

    def run() -> None:
        args.output_dir.mkdir(parents=True, exist_ok=True)  # now, not after an hour of learning
        with tempfile.TemporaryDirectory() as temporary:
            results = ablate(Path(temporary), args.seeds)
            shutil.copytree(temporary, args.output_dir, dirs_exist_ok=True)
        write_json(args.output_dir / RESULTS_FILE, results)
        show(results)

    return run_command(parser.prog, run)


def ablate(masks_directory: Path, seeds: list[int]) -> dict:
    """Learns all masks and returns what RESULTS_FILE holds; masks of the global budget go to `masks_directory`."""
    import torch

    from bench.pico import pico_model

    model, runs = pico_model("qwen3_moe"), []
    contestants = [(method, budget) for method, budgets in BUDGETS.items() for budget in budgets]
    for seed, sparsity, (method, budget) in itertools.product(seeds, SPARSITIES, contestants):
        console.print(f"[bold]{method}: {sparsity:.0%} of the experts' channels, {budget} budget, seed {seed}")
        with tempfile.TemporaryDirectory() as temporary:
            checkpoint = Path(temporary) / "ckpt"
            runs.append(learn_one(model, checkpoint, sparsity, method, budget, seed))
            if (method, budget) == ("ddp", "global") and seed == seeds[0]:
                shutil.copyfile(checkpoint / MASKS_FILE, masks_directory / f"global_{sparsity * 100:.0f}.safetensors")
    return {
        "model": read_json(model / "pico.json"),
        "ddp": SETTINGS,
        "reap": CALIBRATION,
        "runs": runs,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            **{library: version(library) for library in ("torch", "transformers")},
        },
    }


def learn_one(model: Path, checkpoint: Path, sparsity: float, method: str, budget: str, seed: int) -> dict:
    """One run of a method, its masks written to `checkpoint`: settings, perplexity and what is left of each expert."""
    from safetensors.torch import load_file

    from learner.job import METHODS, Job
    from learner.learn import learn

    settings = SETTINGS if method == "ddp" else CALIBRATION
    job = Job(
        model=str(model),
        method=method,
        sparsity=sparsity,
        head_sparsity=0,
        data=[str(model / "train.txt")],
        eval_data=[str(model / "heldout.txt")],
        device="cpu",
        seed=seed,
        settings=METHODS[method].settings(**settings, budget=budget),
    )
    (results,) = learn(job, checkpoint)
    masks = load_file(checkpoint / MASKS_FILE)
    return {
        "sparsity": sparsity,
        "method": method,
        "budget": budget,
        "seed": seed,
        **results,
        "expert_widths": [
            (layer.expert > 0).sum(1).tolist() for layer in layer_masks(masks, len(masks)) if layer.expert is not None
        ],
    }


def show(results: dict) -> None:
    from bench.experts.router import describe_load

    model, columns = (
        results["model"],
        ("sparsity", "method", "budget", "seed", "perplexity", "removed", "widths", "gone", "seconds"),
    )
    console.print(
        f"dense perplexity {model['heldout_perplexity']:.2f}, token frequencies alone {model['unigram_perplexity']:.2f}"
    )
    console.print(describe_load(model["router_load"]))
    table = Table(
        *columns,
        box=box.SIMPLE,
        caption="widths: least, mean and most of an expert; gone: of width 0, which REAP drops",
    )
    for run in results["runs"]:
        widths = [width for layer in run["expert_widths"] for width in layer]
        table.add_row(
            f"{run['sparsity']:.0%}",
            run["method"],
            run["budget"],
            str(run["seed"]),
            f"{run['masked_perplexity']:.2f}",
            f"{run['expert_sparsity']:.2%}",
            f"{min(widths)} / {mean(widths):.1f} / {max(widths)}",
            str(widths.count(0)),
            f"{run['learning_seconds']:.0f}",
        )
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
