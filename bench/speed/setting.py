"""What is timed and how: the options that benchmarks of whole engines share, and the models that they are given."""

import argparse
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bench.speed.engines import engine_options, measure, measure_in_rounds, probe_machine
from bench.speed.results import describe_hardware, describe_versions
from pruned_vllm.common.arguments import positive_int
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import read_json
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.headers import read_headers
from pruned_vllm.formats.ideal import Case


@dataclass(frozen=True)
class Setting:
    """What is timed and how; the options of the command.

    Raises:
        InputError: a case does not fit into `max_model_len`.
    """

    cases: Sequence[Case]
    repeats: int = 7
    rounds: int = 1
    load_format: str = "auto"
    dtype: str = "auto"
    max_model_len: int | None = None
    compile: bool = True

    def __post_init__(self) -> None:
        if self.context_length < self.needed_length:
            raise InputError(
                f"--max-model-len {self.max_model_len} is too small: the longest of the --cases needs "
                f"{self.needed_length}"
            )

    @property
    def needed_length(self) -> int:
        return max(case.input_len + case.output_len for case in self.cases)

    @property
    def context_length(self) -> int:
        return self.max_model_len or self.needed_length

    def engine_options(self, dense: ModelGeometry, models: Sequence[dict]) -> list[dict]:
        """Arguments of `vllm.LLM` for an engine of each model; `models` say what differs between them."""
        options = engine_options(
            dense,
            self.cases,
            load_format=self.load_format,
            dtype=self.dtype,
            max_model_len=self.context_length,
            compile=self.compile,
            num_engines=len(models),
        )
        return [options | model for model in models]

    def describe(self, dtype) -> dict:
        """What results say of themselves; `dtype` is the one that the engines chose."""
        return {
            "settings": {
                "repeats": self.repeats,
                "rounds": self.rounds,
                "load_format": self.load_format,
                "dtype": str(dtype).removeprefix("torch."),
                "max_model_len": self.context_length,
                "compile": self.compile,
            },
            "versions": describe_versions(),
            "hardware": describe_hardware(),
        }


class Timing(NamedTuple):
    """What engines took in turns.

    Attributes:
        samples: seconds by case, engine and repeat, round after round.
        dtype: the torch.dtype that the engines chose.
        machine: what this machine can do (bench/speed/machine.py), measured before the first round.
    """

    samples: dict[Case, list[list[float]]]
    dtype: Any
    machine: dict


def time_models(setting: Setting, dense: ModelGeometry, models: Sequence[dict]) -> Timing:
    """Times the cases on an engine of each model, the dense one first. Raises InputError as `run_in_rounds` does."""
    machine: dict = {}

    def run(engines: list) -> dict:
        if not machine:
            machine.update(probe_machine(engines[0], dense, setting.cases))
        return measure(engines, setting.cases, dense.vocab_size, setting.repeats)

    samples, dtype = run_in_rounds(setting, dense, models, run)
    return Timing(samples, dtype, machine)


def run_in_rounds(
    setting: Setting, dense: ModelGeometry, models: Sequence[dict], run: Callable[[list], dict]
) -> tuple[dict, Any]:
    """What `measure_in_rounds` gathers from `run`, and the torch.dtype that the engines chose.

    Args:
        models: what differs between the engines' arguments, as in `Setting.engine_options`.

    Raises:
        InputError: the second engine chose another dtype than the first.
    """
    dtypes: list = []

    def checked(engines: list) -> dict:
        dtypes[:] = [engine.model_config.dtype for engine in engines]
        if dtypes[0] != dtypes[1]:
            raise InputError(f"--dense runs in {dtypes[0]}, --pruned in {dtypes[1]}; choose one with --dtype")
        return run(engines)

    samples = measure_in_rounds(setting.engine_options(dense, models), setting.rounds, checked)
    return samples, dtypes[0]


def read_models(directories: Mapping[str, Path], max_model_len: int, load_format: str) -> list[ModelGeometry]:
    """Geometries of the directories, which are named by the option that gave them.

    Raises:
        InputError: a directory is no model, they cannot be compared, or a case does not fit into their context.
    """
    problems, geometries = [], {}
    for option, directory in directories.items():
        try:
            config = read_json(directory / "config.json")
            geometries[option] = ModelGeometry.from_config(config)
            longest = config.get("max_position_embeddings") or max_model_len
            if longest < max_model_len:
                problems.append(
                    f"{option} {directory}: max_position_embeddings is {longest} but {max_model_len} tokens of context "
                    "are needed; choose shorter --cases or a smaller --max-model-len"
                )
            if load_format == "auto":
                read_headers(directory)
        except (OSError, ValueError) as error:
            problems.append(f"{option} {directory}: {error}")
    for (first, dense), (second, pruned) in itertools.pairwise(geometries.items()):
        if dense.vocab_size != pruned.vocab_size:
            problems.append(f"{first} has vocab_size {dense.vocab_size}, {second} has {pruned.vocab_size}")
        if dense.family != pruned.family:
            problems.append(f"{first} is a {dense.family.model_type}, {second} a {pruned.family.model_type} model")
    if problems:
        raise InputError("These models cannot be timed against each other:", problems)
    return list(geometries.values())


def add_setting_arguments(parser: argparse.ArgumentParser, default_cases: Sequence[str]) -> None:
    """Adds the options that `chosen_settings` reads."""
    add_cases_argument(parser, default_cases)
    add = parser.add_argument
    add("--repeats", type=positive_int, default=7, help="runs per case and engine after one warm-up; default: 7")
    add_load_format_argument(parser)
    add(
        "--dtype",
        choices=("auto", "bfloat16", "float16", "float32"),
        help="default: auto (as config.json says), bfloat16 with --load-format dummy",
    )
    add("--max-model-len", type=positive_int, metavar="TOKENS", help="default: what the longest case needs")
    add("--eager", action="store_true", help="no compilation and no CUDA graphs; default: compiled, as vllm serve does")


def add_cases_argument(parser: argparse.ArgumentParser, default_cases: Sequence[str]) -> None:
    parser.add_argument(
        "--cases",
        type=case,
        nargs="+",
        default=[Case.parse(text) for text in default_cases],
        metavar="CASE",
        help=f"decode:BATCH:INPUT:OUTPUT or prefill:BATCH:INPUT, in tokens; default: {' '.join(default_cases)}",
    )


def add_load_format_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--load-format",
        choices=("auto", "dummy"),
        default="auto",
        help="dummy: random weights, the directories need a config.json only (see bench/scale.py); default: auto",
    )


def chosen_settings(args: argparse.Namespace) -> dict:
    """Arguments of `Setting`."""
    return {
        "cases": args.cases,
        "repeats": args.repeats,
        "load_format": args.load_format,
        "dtype": args.dtype or ("bfloat16" if args.load_format == "dummy" else "auto"),
        "max_model_len": args.max_model_len,
        "compile": not args.eager,
    }


def case(text: str) -> Case:
    """Type of a command line argument."""
    try:
        return Case.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
