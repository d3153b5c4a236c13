"""What bench.methods measured: perplexities of pico models, and whether the papers' orderings hold."""

from statistics import mean, pstdev

from bench.tables.markdown import bullet, from_to, markdown_table, percent, results

MODELS = {"llama": "Llama", "qwen3": "Qwen3", "qwen3_moe": "Qwen3-MoE"}
TABLE, ABLATIONS = "methods/methods.json", "method_ablations/methods.json"
DDP_PARTS = {
    "hard-concrete": "hard-concrete (stochastic)",
    "deterministic hard-concrete": "deterministic hard-concrete",
    "+ expanded masks": "+ expanded masks",
    "+ distillation (ddp)": "+ distillation (DDP)",
}
GATES, GATES_FAST = "gate and distillation", "gate and distillation, learning rate 0.08"


def table() -> str:
    runs = results(TABLE)["runs"]
    questions = list(dict.fromkeys(run["question"] for run in runs))
    answers = list(dict.fromkeys(run["answer"] for run in runs))
    header = [f"{MODELS[name]} {share.replace('%', ' %')}" for name, share in (text.split() for text in questions)]
    by_place = {(run["question"], run["answer"]): run for run in runs}
    dense = [f"{by_place[question, answers[0]]['dense_perplexity']:.1f}" for question in questions]
    rows = [("dense", *dense, "")]
    for answer in answers:
        found = [by_place[question, answer] for question in questions]
        seconds = [run["learning_seconds"] for run in found]
        shown = "below 1" if max(seconds) < 0.5 else from_to([max(1, value) for value in seconds], ".0f")
        rows.append((f"`{answer}`", *(f"{run['masked_perplexity']:.1f}" for run in found), shown))
    return markdown_table(("", *header, "seconds"), rows)


def table_notes() -> str:
    runs = results(TABLE)["runs"]
    few = [run for run in runs if run["sparsity"] == 0.2]
    whole = {run["head_sparsity"] for run in few if run["answer"] not in ("tyr", "ddp")}
    single = {run["head_sparsity"] for run in few if run["answer"] in ("tyr", "ddp")}
    if whole != {0.25} or len(single) != 1:
        raise ValueError(f"heads removed at 20 %: {whole} and {single}; the sentence below says otherwise")
    over = [
        100 * (run.get("channel_sparsity", run.get("expert_sparsity")) - run["sparsity"])
        for run in runs
        if run["answer"] == "ddp"
    ]
    return bullet(
        'Baselines and MaskPrune remove 2 of 8 heads (1 of 4 KV heads) of every layer at "20 %", Tyr and DDP '
        f"{percent(single.pop())} of all heads. DDP removes {from_to(over, '.1f')} points too many channels in so few "
        "steps."
    )


def ddp_parts() -> str:
    rows = []
    for answer, name in DDP_PARTS.items():
        figures: list[str] = []
        for question in (GATES, GATES_FAST):
            runs = _ablation(question, answer)
            removed = (mean(run[f"{kind}_sparsity"] for run in runs) for kind in ("head", "channel"))
            figures += (_spread(runs, 1), ", ".join(percent(share) for share in removed))
        rows.append((name, *figures))
    header = ("", "0.02", "removed of heads, channels", "0.08", "removed of heads, channels")
    return markdown_table(header, rows)


def budgets() -> str:
    names = {"of each expert": "each expert", "of each layer": "each layer", "global": "the model"}
    rows = []
    for answer, name in names.items():
        runs = _ablation("budget", answer)
        rows.append((name, _spread(runs, 2), percent(mean(run["expert_sparsity"] for run in runs))))
    dense = _ablation("budget", "global")[0]["dense_perplexity"]
    header = (f"what has a budget, Qwen3-MoE (dense {dense:.2f}), heads kept", "perplexity")
    return markdown_table((*header, "removed of experts' channels"), rows)


def tyr_parts() -> str:
    names = {
        "uniform sparsity": "all layers alike, pruned the same way",
        "search without error accumulation": "search without error accumulation",
        "search (tyr)": "search",
    }
    rows = []
    for answer, name in names.items():
        runs = _ablation("search", answer)
        removed = mean((run["head_sparsity"] + run["channel_sparsity"]) / 2 for run in runs)
        rows.append((name, _spread(runs, 2), percent(removed)))
    dense = _ablation("search", "search (tyr)")[0]["dense_perplexity"]
    return markdown_table((f"Tyr, Llama (dense {dense:.2f})", "perplexity", "removed"), rows)


def ablation_notes() -> str:
    expert, layer, model = (_perplexities("budget", name) for name in ("of each expert", "of each layer", "global"))
    if not all(a > b > c for a, b, c in zip(expert, layer, model, strict=True)):
        raise ValueError("budgets are not in this order in every seed; the sentence below says so")
    worse = [_where_deterministic_is_worse(question) for question in (GATES, GATES_FAST)]
    gains = mean(layer) - mean(model), mean(expert) - mean(layer)
    return "\n".join(
        (
            bullet(
                "These hold: expanded masks are DDP's largest step, distillation helps, one budget for all beats one "
                f"for each layer, which beats one for each expert (in every seed, though by {gains[0]:.2f} and "
                f"{gains[1]:.2f}), and Tyr's search beats equal sparsity."
            ),
            bullet(
                "Deterministic hard-concrete does not reliably beat the stochastic one: it is better in two of three "
                f"seeds at either learning rate and worse in the third, by {worse[0]:.1f} and {worse[1]:.1f}; the "
                "means differ by less than the spread."
            ),
        )
    )


def _where_deterministic_is_worse(question: str) -> float:
    """By how much, in the one of three seeds."""
    deterministic, stochastic = (
        _perplexities(question, answer) for answer in ("deterministic hard-concrete", "hard-concrete")
    )
    worse = [by for by in (a - b for a, b in zip(deterministic, stochastic, strict=True)) if by > 0]
    if len(worse) != 1:
        raise ValueError(
            f"{question}: deterministic hard-concrete is worse in {len(worse)} seeds; the text says in one"
        )
    return worse[0]


def _ablation(question: str, answer: str) -> list[dict]:
    """Runs of all seeds."""
    runs = results(ABLATIONS)["runs"]
    return [run for run in runs if (run["question"], run["answer"]) == (question, answer)]


def _perplexities(question: str, answer: str) -> list[float]:
    return [run["masked_perplexity"] for run in sorted(_ablation(question, answer), key=lambda run: run["seed"])]


def _spread(runs: list[dict], digits: int) -> str:
    perplexities = [run["masked_perplexity"] for run in runs]
    return f"{mean(perplexities):.{digits}f} ± {pstdev(perplexities):.{digits}f}"
