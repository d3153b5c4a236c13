"""What `make real` measured: a real pretrained model, pruned by every method, recovered, served, asked and timed.

A function's `run` is the directory in bench/results.
"""

from collections.abc import Mapping

from bench.speed.statistics import interval_text
from bench.tables.markdown import case_name, markdown_table, millions, paragraph, percent, results, short_case_name

REAL = "real"  # SmolLM2; Gemma 3 is in real_gemma3
TITLES = {"ddp": "DDP", "tyr": "Tyr", "maskprune": "MaskPrune", "wanda": "Wanda", "magnitude": "magnitude"}


def _measured(run: str) -> dict:
    return results(f"{run}/real.json")


def table(run: str = REAL) -> str:
    """Perplexity, masked and served, and right answers of every model."""
    return quality(_measured(run))


def quality(measured: Mapping) -> str:
    models = measured["models"]
    rows = []
    for name, model in models.items():
        perplexity, questions = model["perplexity"], model["questions"]
        masked = perplexity.get("masked", perplexity["converted"])
        rows.append(
            (
                title(name, models),
                millions(model["parameters"]),
                *_removed(model["learning"] if "method" in model else {}),
                perplexity_text(masked),
                perplexity_text(perplexity["served"]),
                f"{questions['right']} of {questions['questions']}",
                _minutes(model.get("learning", {})),
            )
        )
    header = ["", "parameters", "heads removed", "channels removed"]
    header += ["perplexity in Transformers", "served by vLLM", "right answers", "minutes of learning"]
    return markdown_table(header, rows)


def title(name: str, models: Mapping) -> str:
    """DDP, 20 %; DDP, 20 %, recovered"""
    if name == "dense":
        return name
    recovered_from = models[name].get("from")
    method, _, share = (recovered_from or name).partition("-")
    return f"{TITLES[method]}, {share} %" + (", recovered" if recovered_from else "")


def notes(run: str = REAL) -> str:
    """What the table's figures are worth."""
    measured = _measured(run)
    questions = measured["models"]["dense"]["questions"]
    minutes = sum(step["seconds"] for step in measured["steps"].values()) / 60
    return paragraph(
        f"Perplexity over {measured['text']['tokens']:,} held-out tokens of Python's own documentation, in blocks of "
        f"128 tokens, float32. The {questions['questions']} questions have four answers each, so guessing gets "
        f"{questions['questions'] / 4:.0f} right, and the standard error is "
        f"{questions['standard_error'] * questions['questions']:.1f} answers for the dense model: only large "
        f"differences count. The weights came from {measured['model']['source']}. All {len(measured['steps'])} steps "
        f"together took {minutes:.0f} minutes."
    )


def speed(run: str = REAL) -> str:
    """The best model of each sparsity against the dense one, on vLLM."""
    return speedups(_measured(run))


def speedups(measured: Mapping) -> str:
    rows = []
    for found in measured["speed"].values():
        name = title(found["pruned"], measured["models"])
        for case in found["cases"]:
            about = name if case is found["cases"][0] else ""
            rows.append((about, case_name(case), _speedup(case), f"{case['of_ideal']:.2f}"))
    return markdown_table(("model", "case", "speedup (95 % interval) of the ideal", "of ideal"), rows)


def _speedup(case: Mapping) -> str:
    return f"{case['speedup']:.2f}x ({interval_text(case)}) of {case['ideal_speedup']:.2f}x"


def headline() -> str:
    """The dense model, and the best of each sparsity before and after recovery."""
    measured = _measured(REAL)
    models = measured["models"]
    cases = [short_case_name(case["name"]) for case in measured["speed"]["20"]["cases"]]
    rows = [("dense", *_facts(models["dense"]), *[""] * len(cases))]
    for share, found in measured["speed"].items():
        best = found["pruned"]
        rows.append((title(best, models), *_facts(models[best]), *map(_speedup, found["cases"])))
        rows.append((title(f"recovered-{share}", models), *_facts(models[f"recovered-{share}"]), *[""] * len(cases)))
    return markdown_table(("", "parameters", "perplexity", "right answers", *cases), rows)


def _facts(model: Mapping) -> tuple[str, str, str]:
    questions = model["questions"]
    return (
        millions(model["parameters"]),
        perplexity_text(model["perplexity"]["served"], 1),
        f"{questions['right']} of {questions['questions']}",
    )


def chat(run: str = REAL) -> str:
    """What the served models answered."""
    return answers(_measured(run))


def answers(measured: Mapping) -> str:
    models = measured["models"]
    shown = ["dense"]
    for share, found in measured["speed"].items():
        shown += [found["pruned"], f"recovered-{share}"]
    header = ("", *(_cell(turn["prompt"]) for turn in models["dense"]["chat"]))
    rows = [(title(name, models), *(_cell(turn["answer"]) for turn in models[name]["chat"])) for name in shown]
    return markdown_table(header, rows)


def summary(measured: Mapping) -> str:
    """All of it, for a terminal."""
    return "\n\n".join((quality(measured), answers(measured), speedups(measured)))


def _removed(learning: Mapping) -> list[str]:
    shares = [learning.get(f"{kind}_sparsity") for kind in ("head", "channel")]
    return ["" if share is None else percent(share) for share in shares]


def perplexity_text(value: float, digits: int = 2) -> str:
    """27.29; 3,940 where nobody needs digits behind the point."""
    return f"{value:,.{digits if value < 1000 else 0}f}"


def _minutes(learning: Mapping) -> str:
    seconds = learning.get("learning_seconds", learning.get("training_seconds"))
    if seconds is None:
        return ""
    return f"{seconds / 60:.0f}" if seconds >= 60 else "below 1"


def _cell(text: str) -> str:
    """On one line, and without what ends a cell or is Markdown."""
    for character, escaped in {"\\": "\\\\", "|": "\\|", "<": "&lt;", "*": "\\*", "`": "\\`", "_": "\\_"}.items():
        text = text.replace(character, escaped)
    return " ".join(text.split())
