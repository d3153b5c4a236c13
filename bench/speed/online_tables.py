"""Shows online results on the terminal: the servers, and what each answered in each scenario."""

from collections.abc import Mapping, Sequence

from rich.table import Table

from bench.speed.memory import GIB
from bench.speed.report import numbers_table
from bench.speed.statistics import interval_text

# What a row of a scenario shows: its label, its key in RUN, its format.
ROWS = (
    ("requests/s", "requests_per_s", ".2f"),
    ("output tokens/s", "output_tokens_per_s", ".1f"),
    ("goodput requests/s", "goodput_requests_per_s", ".2f"),
    *(
        (f"{label} p{p} ms", f"{key}_p{p}_ms", ".0f")
        for label, key in (("TTFT", "ttft"), ("TPOT", "tpot"), ("ITL", "itl"), ("E2E", "e2e"))
        for p in (50, 90, 99)
    ),
    ("output tokens per step", "mean_batch", ".1f"),
    ("preemptions", "preemptions", ".0f"),
)


def servers_table(servers: Mapping[str, Mapping]) -> Table:
    """Memory and start of each server; the first start counts, which found nothing compiled."""
    headers = ("weights\nGiB", "KV cache\ntokens", "peak\nGiB", "load\ns", "compile\ns", "ready\ns", "first\ntoken s")
    shown = numbers_table("server", *headers)
    for name, server in servers.items():
        start = server["starts"][0]
        shown.add_row(
            name,
            _number(server["weights_bytes"] / GIB, ".2f"),
            _number(server["kv_cache_tokens"], ","),
            _number(server["peak_memory_bytes"] and server["peak_memory_bytes"] / GIB, ".1f"),
            *(_number(start[key], ".1f") for key in ("weights_load_s", "compile_s", "ready_s", "first_token_s")),
        )
    return shown


def scenarios_table(scenarios: Sequence[Mapping]) -> Table:
    """Medians of both servers, the pruned model's gain with its 95 % interval, and the ideal ones."""
    shown = numbers_table("scenario", "dense", "pruned", "speedup", "95 %\ninterval")
    for scenario in scenarios:
        shown.add_row(f"[bold]{scenario['name']}")
        for label, key, number_format in ROWS:
            dense, pruned = (scenario[name]["median"][key] for name in ("dense", "pruned"))
            if dense is None and pruned is None:
                continue
            values = [_number(value, number_format) for value in (dense, pruned)]
            shown.add_row(f"  {label}", *values, *_interval(scenario["speedups"].get(key)))
        for name, ideal in (scenario["ideal"] or {}).items():
            shown.add_row(f"  ideal: {name.replace('_', ' ')}", "", "", f"{ideal:.2f}x", "")
    return shown


def _interval(speedup: Mapping | None) -> tuple[str, str]:
    if speedup is None:
        return "", ""
    return f"{speedup['speedup']:.2f}x", interval_text(speedup, "-")


def _number(value: float | None, number_format: str) -> str:
    return "" if value is None else format(value, number_format)
