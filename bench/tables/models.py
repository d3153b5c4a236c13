"""What `make demo` measured: perplexity of the small model, speed of its pattern at half a billion parameters."""

from statistics import mean

from bench.tables.markdown import (
    case_name,
    from_to,
    markdown_table,
    millions,
    paragraph,
    percent,
    results,
    with_quartiles,
)

DEMO = "cpu_demo/e2e_speedup.json"


def demo_perplexity() -> str:
    perplexity = results("cpu_demo/perplexity.json")
    # The demo's runs are those of bench.methods at one half; its own files do not say what was removed.
    runs = {run["answer"]: run for run in results("methods/methods.json")["runs"] if run["question"] == "llama 50%"}

    def removed(method: str, name: str) -> tuple[str, str]:
        run = runs[method]
        if abs(run["masked_perplexity"] - perplexity[name]) > 1e-3:
            raise ValueError(f"bench.methods and the demo disagree about {name}")
        return percent(run["head_sparsity"]), percent(run["channel_sparsity"])

    ddp, magnitude, random = "masked by DDP (Hugging Face)", "masked by magnitude", "masked by random"
    rows = [
        ("token frequencies alone", f"{perplexity['unigram frequencies']:.1f}", "", ""),
        ("dense", f"{perplexity['dense']:.1f}", "", ""),
        ("masked by DDP, 300 steps (Hugging Face)", f"{perplexity[ddp]:.3f}", *removed("ddp", ddp)),
        (
            "converted (vLLM server, by prompt log-probabilities)",
            f"{perplexity['converted (vLLM)']:.3f}",
            *removed("ddp", ddp),
        ),
        (
            "masked by weight magnitude, same budget in each layer",
            f"{perplexity[magnitude]:.1f}",
            *removed("magnitude", magnitude),
        ),
        ("masked at random, same budget in each layer", f"{perplexity[random]:.1f}", *removed("random", random)),
    ]
    parameters = results("methods/methods.json")["models"]["llama"]["parameters"]
    about = paragraph(
        f"**Same model.** A Llama of {parameters / 1e6:.1f}M parameters (4 layers, 8 heads, 352 channels) trained for "
        "a minute on Python's own documentation, half of its heads and channels removed; perplexity on held-out text, "
        "blocks of 128 tokens:"
    )
    return f"{about}\n\n" + markdown_table(("", "perplexity", "heads removed", "channels removed"), rows)


def demo_speed() -> str:
    measured = results(DEMO)
    dense, pruned = measured["models"]["dense"], measured["models"]["pruned"]
    sizes = (
        f"{millions(dense['parameters'])} dense and {millions(pruned['parameters'])} pruned parameters; medians of "
        f"{measured['settings']['repeats']} interleaved pairs with quartiles:\n\n"
    )
    rows = [
        (
            case_name(case),
            f"{case['dense']['throughput_tokens_per_s']:.1f} tok/s",
            f"{case['pruned']['throughput_tokens_per_s']:.1f} tok/s",
            with_quartiles(case),
            f"{case['ideal_speedup']:.2f}x",
            f"{case['of_ideal']:.2f}",
        )
        for case in measured["cases"]
    ]
    return sizes + markdown_table(("case", "dense", "pruned", "speedup (quartiles)", "ideal", "of ideal"), rows)


def demo_notes() -> str:
    measured = results(DEMO)
    decode = measured["cases"][0]
    steps = decode["output_len"] - 1
    narrow = results("cpu_step_overhead/e2e_speedup.json")["cases"][0]
    overheads = [narrow[model]["median_latency_s"] / steps * 1e3 for model in ("dense", "pruned")]
    step, ideal, overhead = decode["dense"]["median_latency_s"] / steps * 1e3, decode["ideal_speedup"], mean(overheads)
    reached = step / ((step - overhead) / ideal + overhead)
    tokens = [f"{model['kv_cache_tokens_per_gib']:,} {name}" for name, model in measured["models"].items()]
    return paragraph(
        "What decode lacks is mostly time that does not depend on widths: with hidden size 128 a step of as many "
        f"layers still takes {from_to(overheads, '.0f')} ms (`bench/results/cpu_step_overhead/`), of {step:.0f} ms for "
        f"the dense model here; that alone makes {ideal:.2f}x into {reached:.2f}x. "
        f"Tokens of KV cache per GiB: {', '.join(tokens)}."
    )
