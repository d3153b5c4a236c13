"""What bench/online_speedup.py found, and whether its figures can be believed."""

from collections.abc import Iterator, Mapping, Sequence

from bench.speed.memory import GIB
from bench.speed.statistics import interval_text
from bench.tables.markdown import markdown_table, paragraph, results

DIRECTORY = "cpu_online"
TRAFFIC = {
    "saturation": "Llama, ragged, 50 %, chat",
    "long_context": "the same, long prompts, 1.4 GiB",
    "smollm2": "SmolLM2-135M, DDP, 20 %, chat",
}
NULL_TEST = "null_offline"
AGREEMENT = ("agreement_offline", "agreement_online")


def _found(name: str) -> dict:
    return results(f"{DIRECTORY}/{name}.json")


def traffic() -> str:
    """Requests per second and latencies of each model under each kind of traffic."""
    rows = [row for name, title in TRAFFIC.items() for row in _rows(title, _found(name)["scenarios"])]
    header = ("", "requests/s", "gain", "ideal", "TTFT p50, p99, ms", "TPOT p50, p99, ms", "tokens a step")
    return markdown_table(header, rows)


def _rows(title: str, scenarios: Sequence[Mapping]) -> Iterator[tuple[str, ...]]:
    for scenario in scenarios:
        gain, ideal = _gain(scenario), scenario["ideal"]
        bounds = sorted((ideal["prefill"], ideal["decode"]))
        yield (
            f"{title}: {_name(scenario)}",
            _both(scenario, "requests_per_s", ".2f"),
            f"{gain['speedup']:.2f}x ({interval_text(gain)})",
            f"{bounds[0]:.2f} to {bounds[1]:.2f}x",
            *(", ".join(_both(scenario, f"{key}_p{p}_ms", ".0f") for p in (50, 99)) for key in ("ttft", "tpot")),
            _both(scenario, "mean_batch", ".1f"),
        )


def _gain(scenario: Mapping) -> Mapping:
    """In requests per second; at a rate, which arrivals decide, in the time of a request."""
    return scenario["speedups"]["e2e_mean_ms" if scenario["kind"] == "rate" else "requests_per_s"]


def _name(scenario: Mapping) -> str:
    value = scenario["value"]
    names = {
        "saturation": "all at once",
        "rate": f"{value or 0:g} requests/s arrive (gain: time of a request)",
        "concurrency": f"{value or 0:g} at a time",
    }
    return names[scenario["kind"]]


def _both(scenario: Mapping, key: str, form: str) -> str:
    return " to ".join(format(scenario[side]["median"][key], form) for side in ("dense", "pruned"))


def servers() -> str:
    """What each server holds, and how long its first start takes."""
    rows = []
    for name, title in TRAFFIC.items():
        for side, server in _found(name)["servers"].items():
            start = server["starts"][0]
            rows.append(
                (
                    f"{title}: {side}" if side == "dense" else side,
                    f"{server['weights_bytes'] / GIB:.2f} GiB",
                    f"{server['kv_cache_tokens']:,} tokens",
                    f"{server['peak_memory_bytes'] / GIB:.1f} GiB",
                    *(
                        "" if start[key] is None else f"{start[key]:.0f} s"
                        for key in ("compile_s", "ready_s", "first_token_s")
                    ),
                )
            )
    return markdown_table(("", "weights", "KV cache", "peak memory", "compile", "ready", "first token"), rows)


def notes() -> str:
    """What the tables say, and whether both benchmarks say the same."""
    return paragraph(f"{_cache_sentence()} {_agreement_sentence()}")


def _cache_sentence() -> str:
    found = _found("long_context")
    scenario = found["scenarios"][0]
    tokens = [found["servers"][side]["kv_cache_tokens"] for side in ("dense", "pruned")]
    batches = [scenario[side]["median"]["mean_batch"] for side in ("dense", "pruned")]
    same_batch = scenario["ideal"]["decode_same_batch"]
    if not tokens[1] > tokens[0] or not batches[1] > batches[0]:
        raise ValueError("the pruned model's KV cache does not hold more than the dense one's")
    return (
        f"Where memory is short, pruning makes room: with long prompts the KV cache holds {tokens[1] / tokens[0]:.1f} "
        f"times the tokens, a step has {batches[1]:.1f} sequences in place of {batches[0]:.1f}, and the gain is "
        f"{_gain(scenario)['speedup']:.2f}x, where decoding equal batches could gain {same_batch:.2f}x at best."
    )


def _agreement_sentence() -> str:
    offline, online = (_found(name) for name in AGREEMENT)
    (case,) = offline["cases"]
    gain = online["scenarios"][0]["speedups"]["tpot_p50_ms"]
    if gain["speedup_low"] > case["speedup_high"] or case["speedup_low"] > gain["speedup_high"]:
        raise ValueError("online and offline do not agree")
    return (
        f"Where both benchmarks measure the same (SmolLM2, one request at a time, time per token), offline finds "
        f"{case['speedup']:.3f}x ({interval_text(case, digits=3)}) and online {gain['speedup']:.3f}x "
        f"({interval_text(gain, digits=3)})."
    )


def null_test() -> str:
    """Whether the benchmark finds no difference where there is none, and one where there is."""
    measured = _found(NULL_TEST)
    rounds = measured["settings"]["rounds"]
    starts = f"engines started {rounds} times" if rounds > 1 else "one start of the engines"
    found = [
        f"`{case['name']}` {case['equal']['speedup']:.3f}x ({interval_text(case['equal'], digits=3)}) against itself, "
        f"{case['slowed']['speedup']:.3f}x where the second engine was slowed by a tenth, which "
        f"{'passes' if case['passed'] else 'does not pass'}"
        for case in measured["cases"]
    ]
    return paragraph(f"The null test here, with SmolLM2 and {starts}: {'; '.join(found)}.")
