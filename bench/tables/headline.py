"""The few figures that README.md shows: the same as in bench/README.md, fewer of them."""

from bench.tables.markdown import case_name, markdown_table, millions, results, with_quartiles

MODELS = {"Llama, half of heads and channels": "cpu_demo", "Qwen3-MoE, half of the experts' channels": "cpu_moe"}


def table() -> str:
    rows = []
    for name, directory in MODELS.items():
        measured = results(f"{directory}/e2e_speedup.json")
        sizes = " to ".join(millions(model["parameters"]) for model in measured["models"].values())
        for case in measured["cases"]:
            about = f"{name}, {sizes}" if case is measured["cases"][0] else ""
            rows.append((about, case_name(case), with_quartiles(case), f"{case['ideal_speedup']:.2f}x"))
    return markdown_table(("model", "case", "speedup (quartiles)", "ideal"), rows)
