"""What bench.sweep measured: speedups over what is removed, ragged and uniform, of models with and without experts."""

from collections.abc import Iterator, Mapping, Sequence

from bench.tables.markdown import from_to, markdown_table, millions, paragraph, results, short_case_name

SWEEP = "cpu_sweep/sweep.json"
NAMES = {"MHA": "Llama", "GQA": "Llama, GQA", "MoE": "Qwen3-MoE"}


def headline() -> str:
    """The ragged models at one half: the few figures that README.md shows."""
    return _table([cell for cell in _cells() if cell["pattern"] == "ragged" and cell["sparsity"] == 50])


def table() -> str:
    return _table(_cells())


def _table(cells: Sequence[Mapping]) -> str:
    rows = []
    for cell in cells:
        sizes = f"{millions(cell['dense_parameters'])} to {millions(cell['parameters'])}"
        speedups = (f"{_interval(case)} of {case['ideal_speedup']:.2f}x" for case in cell["cases"])
        rows.append((f"{NAMES[cell['model']]}, {cell['pattern']}, {cell['sparsity']} %", sizes, *speedups))
    return markdown_table(("", "parameters", *(short_case_name(case["name"]) for case in cells[0]["cases"])), rows)


def notes() -> str:
    measured = results(SWEEP)
    dense, experts = (
        [case["of_ideal"] for cell in _cells() if (cell["model"] == "MoE") == moe for case in cell["cases"]]
        for moe in (False, True)
    )
    apart = [case["of_uniform"]["speedup"] for _, case in _cases("ragged") if "of_uniform" in case]
    without_experts = [case["of_uniform"]["speedup"] for cell, case in _cases("ragged") if cell["model"] != "MoE"]
    noisy = sum(bool(case["warnings"]) for cell in _cells() for case in cell["cases"])
    machine = measured["machine"]
    return paragraph(
        f"Speedup with its 95 % interval, of the ideal. Without experts {from_to(dense, '.2f')} of the ideal is "
        f"reached, with experts {from_to(experts, '.2f')}. Ragged models run {from_to(without_experts, '.2f')} times "
        f"as fast as uniform ones of their size without experts, {from_to(apart, '.2f')} in all: at prefill the "
        "project's kernel for ragged experts multiplies faster than vLLM's op. In "
        f"{noisy} of the {sum(len(cell['cases']) for cell in _cells())} cases the interval is wider than 5 %. The "
        f"machine reads {machine['bandwidth_gb_per_s']:.0f} GB/s and multiplies "
        f"{machine['gemm_tflop_per_s']:.2f} TFLOP/s on the one thread that an engine has."
    )


def _cells() -> list[dict]:
    return results(SWEEP)["cells"]


def _cases(pattern: str) -> Iterator[tuple[Mapping, Mapping]]:
    for cell in _cells():
        if cell["pattern"] == pattern:
            yield from ((cell, case) for case in cell["cases"])


def _interval(case: Mapping) -> str:
    return f"{case['speedup']:.2f}x ({case['speedup_low']:.2f} to {case['speedup_high']:.2f})"
