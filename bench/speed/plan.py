"""What an online comparison decides before a server starts: traffic, dtype, memory, how many servers live at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.speed.memory import DEFAULT_KV_CACHE_BYTES, GIB, Share, both_fit, share_memory, weights_bytes
from bench.speed.online import Contestant, serve_arguments
from bench.speed.results import describe_hardware, describe_model, describe_versions
from bench.speed.setting import read_models
from bench.speed.traffic import Scenario
from bench.speed.workload import (
    Request,
    describe_lengths,
    draw_lengths,
    has_tokenizer,
    random_requests,
    sharegpt_requests,
    text_requests,
)
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import read_json

LARGEST_CONTEXT = 2048  # by default; what vLLM's benchmark takes of ShareGPT needs no more
LARGEST_SHARED_UTILIZATION = 0.48  # of a GPU, for either of two servers
SHAREGPT_PROMPTS, PROMPTS = 1000, 32
ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
# Options of `vllm serve` that this must know or choose, and the option that says so here.
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


@dataclass(frozen=True)
class Options:
    """The options of bench/online_speedup.py, which explains them."""

    dense: Path
    pruned: Path
    output_dir: Path = Path("results")
    workload: str = "chat"
    sharegpt: Path | None = None
    prompts: str = "random"
    num_prompts: int | None = None
    request_rates: Sequence[float] = ()
    concurrency: Sequence[int] = ()
    no_saturation: bool = False
    goodput: Sequence[tuple[str, float]] = ()
    repeats: int = 3
    seed: int = 0
    memory: float | None = None
    max_model_len: int | None = None
    load_format: str = "auto"
    dtype: str = "auto"
    serve_arguments: Sequence[str] = ()

    @property
    def scenarios(self) -> list[Scenario]:
        chosen = [] if self.no_saturation else [Scenario("saturation")]
        chosen += [Scenario("rate", rate) for rate in dict.fromkeys(self.request_rates)]
        return chosen + [Scenario("concurrency", float(number)) for number in dict.fromkeys(self.concurrency)]


@dataclass(frozen=True)
class Plan:
    """What follows from the options.

    Attributes:
        memory_bytes: of the weights and the KV cache of either server; None: vLLM's own share of the GPU.
        both_live: whether both servers live at the same time.
    """

    options: Options
    contestants: Sequence[Contestant]
    requests: Sequence[Request]
    max_model_len: int
    dtype: str
    memory_bytes: int | None
    both_live: bool

    @property
    def element_bytes(self) -> int:
        return ELEMENT_BYTES[self.dtype]

    @property
    def turns(self) -> str:
        return "both servers live" if self.both_live else "one server at a time"

    def describe(self) -> dict:
        """What online_speedup.json says of models, settings, workload, versions and hardware."""
        options = self.options
        models = {
            contestant.name: describe_model(contestant.directory, contestant.geometry, self.element_bytes)
            for contestant in self.contestants
        }
        settings = {
            "repeats": options.repeats,
            "seed": options.seed,
            "max_model_len": self.max_model_len,
            "dtype": self.dtype,
            "load_format": options.load_format,
            "serve_arguments": list(options.serve_arguments),
            "turns": self.turns,
            "memory_bytes": self.memory_bytes,
            "goodput_ms": dict(options.goodput) or None,
        }
        workload = {
            "name": "sharegpt" if options.sharegpt else options.workload,
            "prompts": "text" if options.sharegpt else options.prompts,
            "num_prompts": len(self.requests),
            **describe_lengths(self.requests),
        }
        described = {"models": models, "settings": settings, "workload": workload}
        return described | {"versions": describe_versions(), "hardware": describe_hardware()}


def make_plan(options: Options) -> Plan:
    """Reads the models' configurations and decides the rest. Writes nothing. Raises InputError."""
    if not options.scenarios:
        raise InputError("--no-saturation leaves nothing to run; choose --request-rates or --concurrency")
    check_serve_arguments(options.serve_arguments)
    directories = {"dense": options.dense, "pruned": options.pruned}
    named = {f"--{name}": directory for name, directory in directories.items()}
    models = read_models(named, options.max_model_len or 1, options.load_format)
    geometries = dict(zip(directories, models, strict=True))
    configs = {name: read_json(directory / "config.json") for name, directory in directories.items()}
    limits = [config.get("max_position_embeddings") or LARGEST_CONTEXT for config in configs.values()]
    max_model_len = options.max_model_len or min(LARGEST_CONTEXT, *limits)
    dtype = choose_dtype(list(configs.values()), options.dtype, options.load_format)
    size = ELEMENT_BYTES[dtype]
    tokenizers = all(map(has_tokenizer, directories.values()))
    requests = choose_requests(options, geometries["dense"].vocab_size, tokenizers, max_model_len)
    weights = {
        name: weights_bytes(directory, geometries[name], configs[name], size) for name, directory in directories.items()
    }
    per_token = {name: geometry.kv_cache_bytes_per_token(size) for name, geometry in geometries.items()}
    memory_bytes, both_live = choose_memory(options, weights["dense"])
    shares = {name: Share(weight, None) for name, weight in weights.items()}
    if memory_bytes is not None:
        shares = share_memory(memory_bytes, weights, per_token, max_model_len)
    contestants = []
    for name, directory in directories.items():
        arguments = serve_arguments(
            dtype=dtype,
            max_model_len=max_model_len,
            load_format=options.load_format,
            tokenizer=tokenizers,
            share=shares[name],
            more=options.serve_arguments,
        )
        log = options.output_dir / f"online_{name}.log"
        contestants.append(Contestant(name, directory, geometries[name], shares[name], arguments, log))
    return Plan(options, contestants, requests, max_model_len, dtype, memory_bytes, both_live)


def check_serve_arguments(arguments: Sequence[str]) -> None:
    """Raises InputError for options after `--` that are chosen here."""
    problems = []
    for word in arguments:
        name = word.partition("=")[0].replace("_", "-")
        if name in TAKEN:
            problems.append(f"{name}: " + (f"give {TAKEN[name]} before the --" if TAKEN[name] else "is chosen here"))
    if problems:
        raise InputError("These options cannot follow --:", problems)


def choose_dtype(configs: Sequence[Mapping], dtype: str, load_format: str) -> str:
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


def choose_requests(options: Options, vocab_size: int, tokenizers: bool, max_model_len: int) -> list[Request]:
    """The workload that the options describe. Raises InputError."""
    if not tokenizers and (options.sharegpt or options.prompts == "text"):
        option = "--sharegpt" if options.sharegpt else "--prompts text"
        raise InputError(f"{option} needs a tokenizer in both directories; without one, choose --prompts random")
    if options.sharegpt:
        count = options.num_prompts or SHAREGPT_PROMPTS
        return sharegpt_requests(options.sharegpt, options.dense, count, max_model_len, options.seed)
    lengths = draw_lengths(options.workload, options.num_prompts or PROMPTS, max_model_len, options.seed)
    if options.prompts == "text":
        return text_requests(lengths, options.dense, options.seed)
    return random_requests(lengths, vocab_size, options.seed)


def choose_memory(options: Options, dense_weights: int) -> tuple[int | None, bool]:
    """`memory_bytes` and `both_live` of the plan. Raises InputError where the machine holds not even one server."""
    import psutil
    from vllm.platforms import current_platform

    given = round(options.memory * GIB) if options.memory else None
    if not current_platform.is_cpu():
        return given, (utilization(options.serve_arguments) or 1) <= LARGEST_SHARED_UTILIZATION
    memory_bytes = given or dense_weights + DEFAULT_KV_CACHE_BYTES
    return memory_bytes, both_fit(memory_bytes, psutil.virtual_memory().available)


def utilization(arguments: Sequence[str]) -> float | None:
    """What `--gpu-memory-utilization` among the arguments of `vllm serve` says. Raises InputError."""
    words = [part for word in arguments for part in word.split("=", 1)]
    for name, value in zip(words, words[1:], strict=False):
        if name.replace("_", "-") == "--gpu-memory-utilization":
            try:
                return float(value)
            except ValueError:
                raise InputError(f"--gpu-memory-utilization {value} is no number") from None
    return None
