"""What bench.layouts measured: one ragged model, written in different ways."""

from bench.tables.markdown import from_to, markdown_table, millions, paragraph, percent, results, with_quartiles

FILES = {"gqa": "cpu_layouts/gqa.json", "align": "cpu_layouts/align.json", "shapes": "cpu_layouts/shapes.json"}


def table() -> str:
    rows = []
    for name, path in FILES.items():
        for number, variant in enumerate(results(path)["variants"]):
            what = f"`{variant['name']}`"
            if variant["name"] == "unlimited":
                what = f"{variant['distinct_layer_shapes']} distinct shapes, compiled"
            starts = ", ".join(f"{seconds:.0f}" for seconds in variant["start_seconds"]) + " s"
            rows.append(
                (
                    what,
                    millions(variant["parameters"]),
                    starts if name == "shapes" else "",
                    *(with_quartiles(case, "speed", "speed") if number else "1.00x" for case in variant["cases"]),
                    f"{variant['cases'][0]['ideal_speed']:.2f}x",
                )
            )
    return markdown_table(("written with", "parameters", "start", "decode, batch 1", "decode, batch 8", "ideal"), rows)


def notes() -> str:
    padded, compact = results(FILES["gqa"])["variants"]
    one, *_, aligned = results(FILES["align"])["variants"]  # the last is convert-pruned's default
    unlimited, eight, *_ = results(FILES["shapes"])["variants"]
    saved = 1 - compact["parameters"] / padded["parameters"]
    padding = aligned["parameters"] / one["parameters"] - 1
    start = 1 - sum(eight["start_seconds"]) / sum(unlimited["start_seconds"])
    faster = [(case["speed"] - 1) * 100 for case in eight["cases"]]
    more = eight["parameters"] / unlimited["parameters"] - 1
    return paragraph(
        f"So compact query groups save {percent(saved, 0)} of the bytes here at the same speed, and alignment makes no "
        f"difference on CPU; it costs {percent(padding)} of the bytes (`{aligned['name']}`) and is on for the sake of "
        f"GPUs. Eight shapes start {percent(start, 0)} faster, compiled, and decode {from_to(faster, '.0f')} % faster "
        f"although they read {percent(more, 0)} more."
    )
