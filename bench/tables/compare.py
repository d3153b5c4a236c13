"""What `make compare` measured: methods, kinds of text and recovery at equal size on a real pretrained model."""

import math
from collections.abc import Iterator, Mapping

from bench.tables.markdown import markdown_table, percent, results
from bench.tables.real import TITLES as REAL_TITLES
from bench.tables.real import cell, perplexity_text

NOTHING = "None of these models was measured."
TITLES = REAL_TITLES | {
    "wanda": "Wanda (wanda-sp)",
    "flap": "FLAP's score",
    "taylor": "LLM-Pruner's score",
    "depth": "whole layers (ShortGPT)",
    "random": "random",
}
HOW = {
    "full": "all weights",
    "131k": "131k of its own",
    "524k": "524k of its own",
    "long": "after 1000k of DDP",
}
TEXTS = {"text": "foreign text", "self": "its own text", "mixed": "half of each"}


def methods(file: str) -> str:
    return methods_of(results(file))


def recovery(file: str) -> str:
    return recovery_of(results(file))


def answers(file: str) -> str:
    return answers_of(results(file))


def title(name: str) -> str:
    """DDP, 20 %; DDP, 20 %, its own text; recovered, 20 %, 250k tokens of its own text, all weights; dense"""
    if name == "dense":
        return name
    first, share, *rest = name.split("-")
    if first == "recovered":
        data, tokens, *how = rest
        return f"recovered, {share} %, {tokens} tokens of {TEXTS[data]}" + "".join(f", {HOW[each]}" for each in how)
    if not rest:
        return f"{TITLES[first]}, {share} %"
    tokens = "".join(f"{count} tokens of " for count in rest[1:])
    return f"{TITLES[first]}, {share} %, {tokens}{TEXTS[rest[0]]}"


def methods_of(measured: Mapping) -> str:
    """Every method at every budget."""
    models = measured["models"]
    names = [name for name in models if name != "dense" and _is_method(models[name])]
    if not names:
        return NOTHING
    cases = list(dict.fromkeys(case["name"] for name in names for case in models[name].get("speed", ())))
    rows = []
    for name in ("dense", *names):
        model = models[name]
        speeds = {case["name"]: case for case in model.get("speed", ())}
        rows.append(
            (
                title(name),
                f"{model['parameters'] / 1e6:.1f}M",
                *_quality(model),
                *(f"{speeds[case]['speedup']:.2f}x" if case in speeds else "" for case in cases),
                f"{model['seconds']:.0f}" if "seconds" in model else "",
            )
        )
    return markdown_table(("", "parameters", *QUALITY, *cases, "seconds"), rows)


def _is_method(model: Mapping) -> bool:
    """Others are of the study of text and recovery."""
    return not model["from"] and model["data"] in ("", "text")


QUALITY = ("perplexity", "right answers", "KL to the dense answers", "tokens until they differ")


def _quality(model: Mapping) -> tuple[str, ...]:
    agreement = ("", "")
    if "agreement_kl" in model:
        agreement = (
            f"{model['agreement_kl']:.3f}",
            f"{model['agreement_tokens']:.1f} of {model['answer_tokens']:.1f}",
        )
    return perplexity_text(model["perplexity"]), f"{model['right']} of {model['questions']}", *agreement


def recovery_of(measured: Mapping) -> str:
    """What kinds of text and recovery buy: every model that was learned otherwise or trained back, and where it began.

    What comes back is of the loss on held-out text, and of the KL to the dense model's answers.
    """
    models = measured["models"]
    names = [name for name in models if models[name].get("from") or models[name].get("data") in ("self", "mixed")]
    studied = {"-".join(name.split("-")[:2]) for name in names if not models[name]["from"]}  # from foreign text
    if not names:
        return NOTHING
    rows = []
    for name in [name for name in models if name in studied] + names:
        model = models[name]
        before, back = models.get(model["from"] or "", None), ("", "")
        if before is not None:
            lost = math.log(before["perplexity"] / models["dense"]["perplexity"])
            gained = math.log(before["perplexity"] / model["perplexity"])
            back = (_share(gained, lost), "")
            if "agreement_kl" in model:
                nearer = before["agreement_kl"] - model["agreement_kl"]
                back = (back[0], _share(nearer, before["agreement_kl"]))
        rows.append((title(name), *_quality(model), *back, f"{model['seconds'] / 60:.0f}"))
    return markdown_table(("", *QUALITY, "loss that came back", "KL that came back", "minutes"), rows)


def _share(gained: float, lost: float) -> str:
    """Nothing where next to nothing was lost: 1 % of the perplexity."""
    return percent(gained / lost, 0) if lost > 0.01 else ""


def answers_of(measured: Mapping) -> str:
    """What every model says."""
    models = measured["models"]
    prompts = list(models["dense"]["answers"])
    rows = [(title(name), *(cell(model["answers"][prompt]) for prompt in prompts)) for name, model in models.items()]
    return markdown_table(("", *map(cell, prompts)), rows)


def decode_seconds(models: Mapping, case: str) -> Iterator[tuple[str, float]]:
    """Seconds of a step of the models that were timed, and of the dense one: that over the speedup, for the machine may
    have been slower at one time than at another."""
    timed = [name for name in models if "speed" in models[name]]
    found = {name: entry for name in timed for entry in models[name]["speed"] if entry["name"] == case}
    dense = sorted(entry["dense"]["step_s"] for entry in found.values())
    if not dense:
        return
    typical = dense[len(dense) // 2]
    yield "dense", typical
    for name, entry in found.items():
        yield name, typical / entry["speedup"]


def front(places: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names of which no other is as good in both numbers, of which less is better, and better in one."""
    found: list[str] = []
    for name in sorted(places, key=lambda name: places[name]):
        if not found or places[name][1] < places[found[-1]][1]:
            found.append(name)
    return found


def summary(measured: Mapping) -> str:
    """All of it, for a terminal."""
    return "\n\n".join((methods_of(measured), recovery_of(measured), answers_of(measured)))
