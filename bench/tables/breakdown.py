"""What bench.breakdown found: where the steps of two of the sweep's models spend their time."""

from collections.abc import Mapping

from bench.tables.markdown import markdown_table, paragraph, results, short_case_name

FILES = {
    "Qwen3-MoE, ragged, 50 %": "cpu_breakdown/moe_ragged_50.json",
    "Llama, GQA, ragged, 50 %": "cpu_breakdown/gqa_ragged_50.json",
}
TARGET = "targets/avx2/moe_breakdown.json"
SMALL = 0.01  # of the dense step; parts below it in all cases are summed up


def table(files: Mapping[str, str] = FILES) -> str:
    cases = [(name, case) for name, file in files.items() for case in results(file)["cases"]]
    parts = [dict.fromkeys(case["contestants"]["dense"]["parts_s"]) for _, case in cases]
    large = [part for part in parts[0] if any(_share(case, part) >= SMALL for _, case in cases)]
    rows = [(part, *(_both(case, [part]) for _, case in cases)) for part in large]
    small = [part for part in parts[0] if part not in large]
    rows.append(("everything else", *(_both(case, small) for _, case in cases)))
    rows.append(("step", *(_both(case, list(parts[0])) for _, case in cases)))
    header = [f"{name}: {short_case_name(case['name'])}" for name, case in cases]
    return markdown_table(("ms, dense to pruned", *header), rows)


def of_target() -> str:
    """Where the MoE model of bench.targets loses what it lacks to its target on a CPU without AVX-512."""
    (case,) = results(TARGET)["cases"]
    dense, pruned, narrow = (case["contestants"][side] for side in ("dense", "pruned", "narrow"))
    lost, fixed = (1e3 * sum(case[key].values()) for key in ("lost_s", "fixed_s"))
    gemms, experts = (dense["parts_s"][part] / pruned["parts_s"][part] for part in ("GEMMs", "experts"))
    sentence = paragraph(
        f"{case['speedup']:.2f}x of {case['ideal_speedup']:.2f}x: of {lost:.1f} ms that the pruned step lacks to the "
        f"ideal, {fixed:.1f} are that a step of a model without width takes {1e3 * narrow['step_s']:.1f} ms, pruned or "
        f"not. GEMMs, lm_head's among them, run {gemms:.2f}x as fast, experts {experts:.2f}x."
    )
    return f"{table({'MoE': TARGET})}\n\n{sentence}"


def _share(case: Mapping, part: str) -> float:
    dense = case["contestants"]["dense"]
    return dense["parts_s"][part] / dense["step_s"]


def _both(case: Mapping, parts: list[str]) -> str:
    sums = [sum(case["contestants"][side]["parts_s"][part] for part in parts) for side in ("dense", "pruned")]
    return " to ".join(f"{seconds * 1e3:.1f}" for seconds in sums)


def notes() -> str:
    (_, many), (prefill, _) = (results(file)["cases"] for file in FILES.values())
    parts = {side: many["contestants"][side]["parts_s"] for side in ("dense", "pruned")}
    experts = parts["dense"]["experts"] / parts["pruned"]["experts"]
    others = sum(parts["dense"][part] for part in ("GEMMs", "attention op", "KV-cache update")) * 1e3
    attention, gemms = (
        prefill["contestants"]["dense"]["parts_s"][part] / prefill["contestants"]["pruned"]["parts_s"][part]
        for part in ("attention op", "GEMMs")
    )
    return paragraph(
        f"So with experts and 32 sequences the experts themselves run {experts:.2f}x as fast. But {others:.0f} ms of a "
        "dense step are products of attention and lm_head, attention itself and the KV cache, which pruning experts "
        "leaves as they are; the ideal counts their bytes, which take less time than their multiplications. And where "
        "query groups are uneven, the attention op computes all of a layer's as wide as the widest, which shows in "
        f"prefill: {attention:.2f}x, where the GEMMs gain {gemms:.2f}x."
    )
