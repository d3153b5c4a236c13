"""What bench.ragged_moe and bench.pico_moe measured of mixtures of experts."""

from collections.abc import Iterator, Mapping

from bench.tables.markdown import (
    from_to,
    markdown_table,
    paragraph,
    percent,
    results,
    with_quartiles,
)

LAYER_NAMES = {"qwen3-30b-a3b": "Qwen3-30B-A3B layer", "deepseek-moe-16b": "DeepSeekMoE-16B layer"}
DRAWN = "cpu_ragged_moe/ragged_moe.json"
QUANTIZED = "cpu_quantized/ragged_moe.json"
SCHEMES = ("int8", "fp8", "int4")
SAME_KERNEL = "dense, same kernel"
FEW_TOKENS, MANY_TOKENS = (1, 8), (512, 4096)


def drawn_widths() -> str:
    rows = []
    for name, case in _cases(DRAWN):
        count = f"{case['tokens']} token" + "s" * (case["tokens"] > 1)
        rows.append((f"{name}, {count}", *_layer_figures(case)))
    return markdown_table(("case", "over dense", "over padded", "ideal", "of ideal", "of ideal, same kernel"), rows)


def _layer_figures(case: dict) -> tuple[str, ...]:
    dense, padded, same = (case["contestants"][name] for name in ("dense", "widest", SAME_KERNEL))
    return (
        with_quartiles(dense, "speedup_of_ragged"),
        f"{padded['speedup_of_ragged']:.2f}x",
        f"{dense['ideal_speedup']:.2f}x",
        f"{dense['of_ideal']:.2f}",
        f"{same['of_ideal']:.2f}",
    )


def notes() -> str:
    def rates(contestant: str, key: str, form: str, tokens: tuple[int, ...]) -> str:
        return from_to(
            [case["contestants"][contestant][key] for _, case in _cases(DRAWN) if case["tokens"] in tokens], form
        )

    reading, vllm_reading = (rates(name, "gb_per_s", ".0f", FEW_TOKENS) for name in ("ragged", "dense"))
    multiplying, vllm_multiplying = (rates(name, "tflop_per_s", ".2f", MANY_TOKENS) for name in ("ragged", "dense"))
    return paragraph(
        "Ragged experts run in a kernel of the project's own, which reads exactly the rows there are. For 1 and 8 "
        f"tokens the time is that of reading weights, which it does at {reading} GB/s here, and vLLM's op at "
        f"{vllm_reading}. For 512 tokens and more it is that of multiplying: {multiplying} TFLOP/s, and "
        f"{vllm_multiplying} by vLLM's op. \"Same kernel\" runs the dense layer in the project's kernel, too. The "
        "learned widths below were measured on another machine and with the kernel before it had AVX-512 BF16."
    )


def _cases(file: str) -> Iterator[tuple[str, dict]]:
    """The name of each layer with each of its cases."""
    for layer in results(file)["layers"]:
        name = LAYER_NAMES[layer["name"].split(",")[0]]
        yield from ((name, case) for case in layer["cases"])


def quantized() -> str:
    """Ragged experts, 16-bit and quantized, over vLLM's 16-bit op on the dense layer."""
    rows = []
    for name, case in _cases(QUANTIZED):
        found = case["contestants"]
        speedups = [_of_ideal(found["dense"], "speedup_of_ragged")]
        speedups += [_of_ideal(found[f"ragged {scheme}"], "speedup_over_dense") for scheme in SCHEMES]
        rows.append((f"{name}, {case['tokens']}", *speedups))
    return markdown_table(("layer, tokens", "bfloat16", *SCHEMES), rows)


def _of_ideal(contestant: Mapping, key: str) -> str:
    speedup = with_quartiles(contestant, key)
    return f"{speedup} of {contestant['ideal_speedup']:.2f}x: {contestant['of_ideal']:.2f}"


def learned_widths() -> str:
    rows = []
    for share in (20, 40, 60):
        (layer,) = results(f"cpu_ragged_moe/ddp_{share}.json")["layers"]
        widths = f"{from_to(layer['widths'], 'd')} of {layer['full_width']}"
        about = f"{share} % ({percent(1 - layer['kept'])} of this layer), {widths}"
        for case in layer["cases"]:
            rows.append((about, str(case["tokens"]), *_layer_figures(case)))
            about = ""
    header = ("removed, widths", "tokens", "over dense", "over padded", "ideal", "of ideal")
    return markdown_table((*header, "same kernel"), rows)


def perplexity() -> str:
    measured = results("cpu_pico_moe/pico_moe.json")
    model, runs = measured["model"], measured["runs"]
    load = [100 * share for layer in model["router_load"] for share in layer]
    layers, experts = len(model["router_load"]), len(model["router_load"][0])
    even = percent(1 / experts, 2)
    about = paragraph(
        f"A Qwen3-MoE of {model['parameters'] / 1e6:.1f}M parameters ({layers} layers, {experts} experts of 96 "
        f"channels, 2 a token; each expert gets {from_to(load, '.1f')} % of the held-out tokens, {even} would be "
        "even), channels of experts removed by DDP with one budget for all or the same for each, as in the paper's "
        f"ablation; {measured['ddp']['steps']} steps, one seed, held-out perplexity:"
    )
    rows = [("nothing", f"{model['heldout_perplexity']:.2f}", "")]
    for sparsity in sorted({run["sparsity"] for run in runs}):
        of_ddp = [run for run in runs if run["sparsity"] == sparsity and run.get("method", "ddp") == "ddp"]
        both = {run["budget"]: run for run in of_ddp}
        widths = [width for layer in both["global"]["expert_widths"] for width in layer]
        rows.append(
            (
                percent(sparsity, 0),
                f"{both['global']['masked_perplexity']:.2f} ({from_to(widths, 'd')})",
                f"{both['expert']['masked_perplexity']:.2f}",
            )
        )
    return about + "\n\n" + markdown_table(("removed", "one budget for all (widths)", "each expert the same"), rows)
