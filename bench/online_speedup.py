"""Serves a pruned model and its dense original on real vLLM, puts both under the same traffic, and compares.

    python bench/online_speedup.py --dense MODEL --pruned out/                                  # all requests at once
    python bench/online_speedup.py --dense MODEL --pruned out/ --request-rates 1 2 --concurrency 1 4
    python bench/online_speedup.py --dense MODEL --pruned out/ --sharegpt ShareGPT.json         # 1,000 conversations
    python bench/online_speedup.py --dense MODEL --pruned out/ --workload long-context --memory 3
    python bench/online_speedup.py --dense scaled/dense --pruned scaled/pruned --load-format dummy
    python bench/online_speedup.py --dense MODEL --pruned out/ -- --gpu-memory-utilization 0.45 --max-num-seqs 64

Each model gets a `vllm serve` with the options that a user would give: compiled, vLLM's own scheduler, the same memory
for either. What pruning saves in weights and in KV heads becomes KV cache, and so a larger batch. What follows `--`
goes to both. The client is that of `vllm bench serve`; every request gets exactly the output tokens that it asks for.

Runs of the two servers take turns, so a slow phase of the machine hits both. Both live at the same time, only one under
load, if the machine's memory holds them; on a GPU that is where `--gpu-memory-utilization` is at most 0.48. Else one
lives at a time and they are started in turns. The first start of each finds an empty compile cache. Start times are
single measurements; the dense server, which starts first, also brings vLLM's libraries into memory.

With one request at a time this measures what bench/e2e_speedup.py does, seen from the client: TPOT of
`--workload 32:64 --no-saturation --concurrency 1` is its time of `--cases decode:1:32:64` over the 63 steps.

Prints tables and writes online_speedup.json (bench/speed/online.py says what it holds), a report (report.html,
report.md) and the logs of the servers to --output-dir. bench/speed/workload.py says what is asked,
bench/speed/traffic.py what is timed.
"""

import argparse
import shlex
import sys
from pathlib import Path

if not __package__:  # run as a script: search the repository root instead of bench/, as `python -m` does
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.speed.online import compare
from bench.speed.online_tables import scenarios_table, servers_table
from bench.speed.plan import ELEMENT_BYTES, PROMPTS, SHAREGPT_PROMPTS, Options, make_plan
from bench.speed.server import console
from bench.speed.setting import add_load_format_argument
from bench.speed.statistics import named_warnings
from bench.speed.traffic import goodput_target
from bench.speed.workload import workload
from pruned_vllm.common.arguments import positive_float, positive_int, seed
from pruned_vllm.common.command import run_command
from pruned_vllm.common.files import write_json


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench/online_speedup.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dense", type=Path, required=True, metavar="DIR", help="the model before pruning")
    add("--pruned", type=Path, required=True, metavar="DIR", help="what convert-pruned made of it")
    add("--output-dir", type=Path, default=Options.output_dir, metavar="DIR", help="created; default: results")
    add(
        "--workload",
        type=workload,
        default=Options.workload,
        help="chat: lengths like ShareGPT's; long-context; or INPUT:OUTPUT tokens for every request; default: chat",
    )
    add("--sharegpt", type=Path, metavar="FILE", help="conversations in ShareGPT's JSON format instead of --workload")
    add(
        "--prompts",
        choices=("random", "text"),
        default="random",
        help="what a --workload's prompts consist of: random token ids, or Python's documentation; default: random",
    )
    add(
        "--num-prompts",
        type=positive_int,
        help=f"requests per run; default: {PROMPTS}, with --sharegpt {SHAREGPT_PROMPTS}",
    )
    add(
        "--request-rates",
        type=positive_float,
        nargs="+",
        default=[],
        metavar="RATE",
        help="also with requests arriving at these rates per second, as a Poisson process",
    )
    add(
        "--concurrency",
        type=positive_int,
        nargs="+",
        default=[],
        metavar="N",
        help="also with so many requests under way at any time",
    )
    add("--no-saturation", action="store_true", help="leave out the run with all requests at once")
    add(
        "--goodput",
        type=goodput_target,
        nargs="+",
        default=[],
        metavar="TARGET",
        help="also count the requests per second that keep these milliseconds, e.g. ttft:2000 tpot:200 e2el:9000",
    )
    add("--repeats", type=positive_int, default=Options.repeats, help="runs per scenario and server; default: 3")
    add("--seed", type=seed, default=0, help="of lengths, prompts and arrival times; default: 0")
    add(
        "--memory",
        type=positive_float,
        metavar="GIB",
        help="what weights and KV cache of either server take together; default on CPU: the dense weights and 4 GiB, "
        "on a GPU: what vLLM takes (--gpu-memory-utilization)",
    )
    add("--max-model-len", type=positive_int, metavar="TOKENS", help="default: the models', at most 2048")
    add_load_format_argument(parser)
    add(
        "--dtype",
        choices=("auto", *ELEMENT_BYTES),
        default="auto",
        help="default: auto (as config.json says, bfloat16 for float32 as in vLLM; bfloat16 with --load-format dummy)",
    )
    return parser


def run(options: Options, command: str) -> None:
    """Compares, shows tables and writes online_speedup.json. Raises InputError."""
    plan = make_plan(options)
    console.print(f"{len(plan.requests)} requests a run, {options.repeats} repeats, {plan.turns}")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    measured = compare(
        plan.contestants,
        plan.requests,
        options.scenarios,
        repeats=options.repeats,
        both_live=plan.both_live,
        goodput_ms=dict(options.goodput),
        seed=options.seed,
        client_log=options.output_dir / "online_client.log",
        element_bytes=plan.element_bytes,
    )
    results = {"command": command, **plan.describe(), **measured}
    console.print(servers_table(results["servers"]), scenarios_table(results["scenarios"]))
    for warning in named_warnings(results["scenarios"]):
        console.print(warning)
    path = options.output_dir / "online_speedup.json"
    write_json(path, results)
    from bench.report.reports import report_beside  # here, so that --help and bad input need not wait for matplotlib

    console.print(f"written: {', '.join(map(str, [path, *report_beside(path)]))}")


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    end = words.index("--") if "--" in words else len(words)
    args = build_parser().parse_args(words[:end])
    options = Options(**vars(args), serve_arguments=words[end + 1 :])
    command = shlex.join(["python", "bench/online_speedup.py", *words])
    return run_command("online_speedup", lambda: run(options, command))


if __name__ == "__main__":
    sys.exit(main())
