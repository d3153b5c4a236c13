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
lives at a time and they are started in turns. Each starts with an empty compile cache.

Prints tables and writes online_speedup.json (bench/speed/online.py says what it holds) and the logs of the servers to
--output-dir. bench/speed/workload.py says what is asked, bench/speed/traffic.py what is timed.
"""

import argparse
import shlex
import sys
from pathlib import Path

if not __package__:  # run as a script: search the repository root instead of bench/, as `python -m` does
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.speed.memory import DEFAULT_KV_CACHE_BYTES, GIB, Share, both_fit, share_memory, weights_bytes
from bench.speed.results import describe_hardware, describe_model, describe_versions
from bench.speed.setting import read_models
from bench.speed.traffic import Scenario, goodput_target
from bench.speed.workload import (
    Request,
    describe_lengths,
    draw_lengths,
    has_tokenizer,
    random_requests,
    sharegpt_requests,
    text_requests,
    workload,
)
from pruned_vllm.common.arguments import positive_float, positive_int, seed
from pruned_vllm.common.command import run_command
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import read_json, write_json

NAMES = ("dense", "pruned")
LARGEST_CONTEXT = 2048  # by default; what vLLM's benchmark takes of ShareGPT needs no more
LARGEST_SHARED_UTILIZATION = 0.48  # of a GPU, for either of two servers
ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
# What `vllm serve` must be told by this command, because it counts on it; and the option that says so here.
TAKEN = {
    "--dtype": "--dtype",
    "--host": None,
    "--kv-cache-memory-bytes": "--memory",
    "--load-format": "--load-format",
    "--max-model-len": "--max-model-len",
    "--port": None,
    "--served-model-name": None,
    "--skip-tokenizer-init": None,
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench/online_speedup.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dense", type=Path, required=True, metavar="DIR", help="the model before pruning")
    add("--pruned", type=Path, required=True, metavar="DIR", help="what convert-pruned made of it")
    add("--output-dir", type=Path, default=Path("results"), metavar="DIR", help="created; default: results")
    add(
        "--workload",
        type=workload,
        default="chat",
        help="chat: lengths like ShareGPT's; long-context; or INPUT:OUTPUT tokens for every request; default: chat",
    )
    add("--sharegpt", type=Path, metavar="FILE", help="conversations in ShareGPT's JSON format instead of --workload")
    add(
        "--prompts",
        choices=("random", "text"),
        default="random",
        help="what a --workload's prompts consist of: random token ids, or Python's documentation; default: random",
    )
    add("--num-prompts", type=positive_int, help="requests per run; default: 32, with --sharegpt 1000")
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
    add("--repeats", type=positive_int, default=3, help="runs per scenario and server; default: 3")
    add("--seed", type=seed, default=0, help="of lengths, prompts and arrival times; default: 0")
    add(
        "--memory",
        type=positive_float,
        metavar="GIB",
        help="what weights and KV cache of either server take together; default on CPU: the dense weights and 4 GiB, "
        "on a GPU: what vLLM takes (--gpu-memory-utilization)",
    )
    add("--max-model-len", type=positive_int, metavar="TOKENS", help="default: the models', at most 2048")
    add(
        "--load-format",
        choices=("auto", "dummy"),
        default="auto",
        help="dummy: random weights, the directories need a config.json only (see bench/scale.py); default: auto",
    )
    add(
        "--dtype",
        choices=("auto", *ELEMENT_BYTES),
        default="auto",
        help="default: auto (as config.json says, bfloat16 for float32 as in vLLM; bfloat16 with --load-format dummy)",
    )
    return parser


def scenarios(args: argparse.Namespace) -> list[Scenario]:
    """Raises InputError when nothing is left to run."""
    chosen = [] if args.no_saturation else [Scenario("saturation")]
    chosen += [Scenario("rate", rate) for rate in dict.fromkeys(args.request_rates)]
    chosen += [Scenario("concurrency", float(number)) for number in dict.fromkeys(args.concurrency)]
    if not chosen:
        raise InputError("--no-saturation leaves nothing to run; choose --request-rates or --concurrency")
    return chosen


def check_serve_arguments(arguments: list[str]) -> None:
    """Raises InputError for options after `--` that this command sets itself."""
    problems = []
    for word in arguments:
        name = word.partition("=")[0].replace("_", "-")
        if name in TAKEN:
            problems.append(f"{name}: " + (f"give {TAKEN[name]} before the --" if TAKEN[name] else "is chosen here"))
    if problems:
        raise InputError("These options cannot follow --:", problems)


def choose_dtype(configs: list[dict], dtype: str, load_format: str) -> str:
    """The dtype of both servers. Raises InputError when auto would give each another one."""
    if dtype != "auto":
        return dtype
    if load_format == "dummy":
        return "bfloat16"
    stored = [config.get("dtype") or config.get("torch_dtype") or "float32" for config in configs]
    if stored[0] != stored[1]:
        raise InputError(f"--dense is stored in {stored[0]}, --pruned in {stored[1]}; choose one with --dtype")
    chosen = "bfloat16" if stored[0] == "float32" else stored[0]
    if chosen not in ELEMENT_BYTES:
        raise InputError(f"the models are stored in {chosen}; choose one of {', '.join(ELEMENT_BYTES)} with --dtype")
    return chosen


def choose_requests(args: argparse.Namespace, vocab_size: int, tokenizers: bool, max_model_len: int) -> list[Request]:
    """The workload that the options describe. Raises InputError."""
    if not tokenizers and (args.sharegpt or args.prompts == "text"):
        option = "--sharegpt" if args.sharegpt else "--prompts text"
        raise InputError(f"{option} needs a tokenizer in both directories; without one, choose --prompts random")
    if args.sharegpt:
        return sharegpt_requests(args.sharegpt, args.dense, args.num_prompts or 1000, max_model_len, args.seed)
    lengths = draw_lengths(args.workload, args.num_prompts or 32, max_model_len, args.seed)
    if args.prompts == "text":
        return text_requests(lengths, args.dense, args.seed)
    return random_requests(lengths, vocab_size, args.seed)


def utilization(arguments: list[str]) -> float | None:
    """What `--gpu-memory-utilization` among the arguments of `vllm serve` says. Raises InputError."""
    words = [part for word in arguments for part in word.split("=", 1)]
    for name, value in zip(words, words[1:], strict=False):
        if name.replace("_", "-") == "--gpu-memory-utilization":
            try:
                return float(value)
            except ValueError:
                raise InputError(f"--gpu-memory-utilization {value} is no number") from None
    return None


def _run(args: argparse.Namespace, arguments: list[str]) -> None:
    chosen = scenarios(args)
    check_serve_arguments(arguments)
    directories = dict(zip(NAMES, (args.dense, args.pruned), strict=True))
    options = {f"--{name}": directory for name, directory in directories.items()}
    models = read_models(options, args.max_model_len or 1, args.load_format)
    geometries = dict(zip(NAMES, models, strict=True))
    configs = [read_json(directory / "config.json") for directory in directories.values()]
    limits = [config.get("max_position_embeddings") or LARGEST_CONTEXT for config in configs]
    max_model_len = args.max_model_len or min(LARGEST_CONTEXT, *limits)
    dtype = choose_dtype(configs, args.dtype, args.load_format)
    element_bytes = ELEMENT_BYTES[dtype]
    weights = {
        name: weights_bytes(directories[name], geometries[name], config, element_bytes)
        for name, config in zip(NAMES, configs, strict=True)
    }
    tokenizers = all(map(has_tokenizer, directories.values()))
    requests = choose_requests(args, geometries["dense"].vocab_size, tokenizers, max_model_len)

    import psutil
    from vllm.platforms import current_platform

    from bench.speed.online import Contestant, compare, serve_arguments
    from bench.speed.online_tables import scenarios_table, servers_table
    from bench.speed.server import console

    memory_bytes = round(args.memory * GIB) if args.memory else None
    if current_platform.is_cpu():
        memory_bytes = memory_bytes or weights["dense"] + DEFAULT_KV_CACHE_BYTES
    shares = {name: Share(weight, None) for name, weight in weights.items()}
    if memory_bytes:
        per_token = {name: geometries[name].kv_cache_bytes_per_token(element_bytes) for name in NAMES}
        shares = share_memory(memory_bytes, weights, per_token, max_model_len)
    if current_platform.is_cpu():
        both_live = both_fit(memory_bytes, psutil.virtual_memory().available)
    else:
        both_live = (utilization(arguments) or 1) <= LARGEST_SHARED_UTILIZATION
    turns = "both servers live" if both_live else "one server at a time"
    console.print(f"{len(requests)} requests a run, {args.repeats} repeats, {turns}")

    args.output_dir.mkdir(parents=True, exist_ok=True)
    contestants = [
        Contestant(
            name,
            directories[name],
            geometries[name],
            shares[name],
            serve_arguments(
                dtype=dtype,
                max_model_len=max_model_len,
                load_format=args.load_format,
                tokenizer=tokenizers,
                share=shares[name],
                more=arguments,
            ),
            args.output_dir / f"online_{name}.log",
        )
        for name in NAMES
    ]
    measured = compare(
        contestants,
        requests,
        chosen,
        repeats=args.repeats,
        both_live=both_live,
        goodput_ms=dict(args.goodput),
        seed=args.seed,
        client_log=args.output_dir / "online_client.log",
        element_bytes=element_bytes,
    )
    results = {
        "command": shlex.join(["python", "bench/online_speedup.py", *sys.argv[1:]]),
        "date": measured.pop("date"),
        "models": {name: describe_model(directories[name], geometries[name], element_bytes) for name in NAMES},
        "settings": {
            "repeats": args.repeats,
            "seed": args.seed,
            "max_model_len": max_model_len,
            "dtype": dtype,
            "load_format": args.load_format,
            "serve_arguments": arguments,
            "turns": turns,
            "memory_bytes": memory_bytes,
            "goodput_ms": dict(args.goodput) or None,
        },
        "workload": {
            "name": "sharegpt" if args.sharegpt else args.workload,
            "prompts": "text" if args.sharegpt else args.prompts,
            "num_prompts": len(requests),
            **describe_lengths(requests),
        },
        **measured,
        "versions": describe_versions(),
        "hardware": describe_hardware(),
    }
    console.print(servers_table(results["servers"]), scenarios_table(results["scenarios"]))
    for scenario in results["scenarios"]:
        for warning in scenario["warnings"]:
            console.print(f"{scenario['name']}: {warning}")
    path = args.output_dir / "online_speedup.json"
    write_json(path, results)
    console.print(f"written: {path}")


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    end = words.index("--") if "--" in words else len(words)
    args = build_parser().parse_args(words[:end])
    return run_command("online_speedup", lambda: _run(args, words[end + 1 :]))


if __name__ == "__main__":
    sys.exit(main())
