"""What bench.quantized measured: a model dense, pruned, quantized, and both."""

from collections.abc import Mapping

from bench.speed.statistics import interval_text
from bench.tables.markdown import case_name, from_to, markdown_table, millions, paragraph, results

QUANTIZED = "cpu_quantized/quantized.json"
FP8 = "cpu_quantized/fp8.json"


def table() -> str:
    """Sizes, perplexity and speed of every form."""
    return forms(results(QUANTIZED))


def fp8_table() -> str:
    return forms(results(FP8))


def fp8_notes() -> str:
    return multiplied(results(FP8))


def forms(measured: Mapping) -> str:
    cases = [case for found in measured["pairs"].values() for case in _cases(found)]
    titles = dict.fromkeys(case_name(case, tokens=False) for case in cases)
    rows = []
    for pair, found in measured["pairs"].items():
        for form, model in found["models"].items():
            source, _, scheme = form.partition("-")
            name = f"{pair}, {source}{f', {scheme}' if scheme else ''}"
            perplexity = f"{model['perplexity']:.2f}" if "perplexity" in model else "refused"
            speeds = {case_name(case, tokens=False): _speed(case, source, scheme) for case in _cases_of(found, scheme)}
            sizes = millions(model["parameters"]), f"{model['bytes'] / 1e6:.1f}", perplexity
            rows.append((name, *sizes, *(speeds.get(title, "") for title in titles)))
    return markdown_table(("", "parameters", "weights, MB", "perplexity", *titles), rows)


def notes() -> str:
    return multiplied(results(QUANTIZED))


def multiplied(measured: Mapping) -> str:
    """Whether the two gains multiply, in sentences."""
    sentences = [
        "Speedup of decoding over the dense model with its 95 % interval, of the ideal, which is the ratio of bytes "
        "read. Perplexity is that of the served model."
    ]
    times = [found for pair in measured["pairs"].values() for found in pair["schemes"].values() if "settings" in found]
    if dtypes := dict.fromkeys(found["settings"]["dtype"] for found in times):
        sentences.append(f"What is not quantized is {' or '.join(dtypes)}.")
    for pair, found in measured["pairs"].items():
        for scheme, timed in found["schemes"].items():
            if cases := timed.get("cases", ()):
                ratios = [case["of_product"]["ratio"] for case in cases]
                ideals = list(map(_ideal_of_product, cases))
                sentences.append(
                    f"{pair}, pruned and {scheme}: {from_to(ratios, '.2f')} of the product of the two single speedups "
                    f"(the bytes of lm_head, which stays whole, leave {from_to(ideals, '.2f')})."
                )
            sentences += [
                f"{pair}, {scheme}, {form}: refused ({text})." for form, text in timed.get("refused", {}).items()
            ]
    return paragraph(" ".join(sentences))


def summary(measured: Mapping) -> str:
    """All of it, for a terminal."""
    return f"{forms(measured)}\n\n{multiplied(measured)}"


def _ideal_of_product(case: Mapping) -> float:
    """The ideal speedup of both, of the product of the two single ideals."""
    single = case["pruned"]["ideal_speedup"] * case["quantized"]["ideal_speedup"]
    return case["both"]["ideal_speedup"] / single


def _cases(found: Mapping) -> list[Mapping]:
    return [case for timed in found["schemes"].values() for case in timed.get("cases", ())]


def _cases_of(found: Mapping, scheme: str) -> list[Mapping]:
    """The cases in which a form was timed; those without a scheme are in every run, of which the first counts."""
    if scheme:
        return list(found["schemes"][scheme].get("cases", ()))
    return next((list(timed["cases"]) for timed in found["schemes"].values() if "cases" in timed), [])


def _speed(case: Mapping, source: str, scheme: str) -> str:
    if not scheme and source == "dense":
        return "1.00x"
    timed = case["both" if source == "pruned" else "quantized"] if scheme else case["pruned"]
    interval = interval_text(timed)
    return f"{timed['speedup']:.2f}x{f' ({interval})' if interval else ''} of {timed['ideal_speedup']:.2f}x"
