"""What `make demo` says of the small model: perplexity, masked and served."""

from bench.tables.markdown import markdown_table, paragraph, percent, results


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
