"""What bench.targets, bench.budgets, bench.learning_speed and bench.learning_memory measured."""

from collections.abc import Mapping
from statistics import fmean

from bench.budgets import compared
from bench.learning_memory import megabytes
from bench.speed.statistics import interval_text
from bench.tables.markdown import case_name, markdown_table, percent, results
from pruned_vllm.formats.ideal import Case

BUDGETS = {"Llama": "budgets/met_llama.json", "Qwen3-MoE": "budgets/met_qwen3_moe.json"}
JOINT = {
    "Llama": "budgets/joint_llama.json",
    "Qwen3-MoE": "budgets/joint_qwen3_moe.json",
    "SmolLM2-135M": "budgets/joint_SmolLM2-135M-Instruct.json",
}
MEMORY = "learning_memory/learning_memory.json"
MODELS = {"llama": "Llama", "qwen3_moe": "Qwen3-MoE"}
METHODS = {"ddp": "DDP", "maskprune": "MaskPrune", "flap": "FLAP's score", "finetune": "LoRA, from a teacher"}


def targets(file: str = "targets/targets.json") -> str:
    """What --target-speedup promises, and what came."""
    rows = []
    for name, found in results(file)["shapes"].items():
        measured = found["measured"]
        rows.append(
            (
                name,
                case_name(vars(Case.parse(found["budget"]["at"]))),
                f"{found['budget']['target']['speedup']:g}x",
                f"{found['predicted']:.3f}x",
                f"{measured['speedup']:.3f}x ({interval_text(measured, digits=3)})",
                f"{found['of_predicted']:.3f}",
            )
        )
    return markdown_table(("", "case", "asked", "predicted", "measured (95 % interval)", "of predicted"), rows)


def budgets() -> str:
    """How far runs of every length were from their budget before anything was cut, and after."""
    rows = []
    for model, file in BUDGETS.items():
        measured = results(file)
        for run in measured["runs"]:
            if run["method"] == "ddp":
                rows.append(
                    (
                        model,
                        _asked(run),
                        f"{run['steps']}",
                        "the paper's" if run["settle"] == 0 else "",
                        *(percent(round(over, 4) + 0.0, 2) for over in _over(run)),
                        f"{run['masked_perplexity']:.2f}",
                    )
                )
    header = ("", "asked", "steps", "schedule", "over before masks fade", "over before the cut", "over at the end")
    return markdown_table((*header, "perplexity"), rows)


def _over(run: Mapping) -> tuple[float, float, float]:
    return run["over_before_fading"], run["over_before_fixing"], run["of_budget"] - 1


def _asked(run: Mapping) -> str:
    if run["measure"] == "sparsity":
        return f"{percent(run['asked'], 0)} of the units"
    return f"{run['asked'] / 1e6:.2f} MB" if run["measure"] == "bytes" else f"{run['asked']:.2f}x"


def joint() -> str:
    """One budget of bytes for all kinds of units, against as large a share of each kind."""
    rows = []
    for model, file in JOINT.items():
        for method, sparsity, same, separate, together, gains in compared(results(file)["runs"]):
            rows.append(
                (
                    model,
                    METHODS[method],
                    percent(sparsity, 0),
                    f"{fmean(run['joint']['bytes'] for run in same) / 1e6:,.1f} MB",
                    f"{same[0]['joint']['dense_perplexity']:.2f}",
                    f"{fmean(separate):.2f}",
                    f"{fmean(together):.2f}",
                    ", ".join(f"{gain:.3f}" for gain in gains),
                )
            )
    header = ("", "method", "removed", "left", "dense perplexity", "a share of each kind", "one budget")
    return markdown_table((*header, "ratio, each seed"), rows)


def speed(*files: str) -> str:
    """Steps against three forward passes."""
    rows = [
        (
            run["model"],
            METHODS[run["method"]],
            run["dtype"],
            f"{run['tokens_per_s']:,.0f}",
            f"{run['share_of_bound']:.2f}",
            f"{run['peak_bytes'] / 1e9:.2f} GB",
        )
        for file in files
        for run in results(file)["runs"]
    ]
    return markdown_table(("", "method", "dtype", "tokens/s", "of three forward passes", "peak"), rows)


def memory() -> str:
    """One process with all weights, and two that share them."""
    rows = []
    for run in results(MEMORY)["runs"]:
        of_weights = [""] * 4  # of pico models, text takes most
        if run["kind"] == "large":
            sizes = [run["weights_bytes"], run["peak_bytes"], run.get("planned_bytes"), run.get("merging_bytes")]
            of_weights = [megabytes(size) if size else "" for size in sizes]
        rows.append(
            (
                f"{MODELS[run['model']]}, {run['kind']}",
                METHODS[run["method"]],
                f"{run['processes']}, {run['weights']}",
                *of_weights,
                f"{run['apart']:.1e}" if run["apart"] else "0",
            )
        )
    header = ("model", "method", "processes", "weights", "peak while learning", "planned", "while merging", "apart")
    return markdown_table(header, rows)
