"""Asks learn-masks for a speedup, and measures on real vLLM whether the converted model has it.

    python -m bench.targets --output-dir bench/results/targets      # about 10 minutes on two quiet cores
    python -m bench.targets --output-dir out --shapes GQA --speedup 1.3 --at decode:1:32:64

The dense models have random weights and the shapes of bench.sweep: multi-head attention (MHA), grouped queries (GQA),
experts (MoE). What goes is chosen by magnitude, which takes seconds: here the target counts, not the choice. Each is
converted as by default, with padded FFN widths, and its `padded_ideal_speedup` in pruning.json is the prediction.
bench.e2e_speedup then times it against the dense model in the very case that was asked for: in bfloat16, or in float32
on a CPU that multiplies bfloat16 slower, where eight tokens are bound by arithmetic, so --at has two. Engines start
anew for each of --rounds, because two engines of one model differ by some percent for as long as they live.
"""

import argparse
import shlex
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from bench.commands import run, script
from bench.real.plan import DTYPE
from bench.speed.report import numbers_table
from bench.speed.statistics import interval_text, named_warnings
from bench.sweep.shapes import grid_shapes
from pruned_vllm.common.arguments import positive_int
from pruned_vllm.common.command import run_command
from pruned_vllm.common.files import read_json, write_json
from pruned_vllm.formats.masked import PRUNING_FILE

RESULTS_FILE = "targets.json"
AT = {"bfloat16": "decode:8:32:32", "float32": "decode:2:32:32"}  # what memory binds: the prediction counts bytes
SHAPES = tuple(grid_shapes(None, None))
MEASURED = ("speedup", "speedup_q1", "speedup_q3", "speedup_low", "speedup_high", "speedup_confidence")
PROBED = ("median_latency_s", "samples_s", "step_s", "gb_per_s", "of_bandwidth", "of_gemm_rate")
console = Console(highlight=False)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.targets", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output-dir", type=Path, required=True, help=f"gets {RESULTS_FILE}; other shapes in it stay")
    add("--models-dir", type=Path, help="gets the models, SHAPE/dense and SHAPE/pruned; default: they do not stay")
    add("--shapes", nargs="+", choices=SHAPES, default=SHAPES, help="default: all")
    add("--hidden-size", type=positive_int, help="default: 1536, with experts 1024")
    add("--num-hidden-layers", type=positive_int, help="default: 16, with experts 8")
    add("--speedup", default="1.5", help="as of learn-masks --target-speedup; default: %(default)s")
    add("--at", default=AT[DTYPE], metavar="CASE", help="as of learn-masks; default: %(default)s")
    add("--repeats", type=positive_int, default=4, help="runs of an engine in a round; default: %(default)s")
    add("--rounds", type=positive_int, default=2, help="times that engines are started; default: %(default)s")
    args = parser.parse_args(argv)
    command = shlex.join(["python", "-m", "bench.targets", *(sys.argv[1:] if argv is None else argv)])

    def measure() -> None:
        args.output_dir.mkdir(parents=True, exist_ok=True)  # now, not after ten minutes
        shapes = grid_shapes(args.hidden_size, args.num_hidden_layers)
        found = {}
        for name in args.shapes:
            with tempfile.TemporaryDirectory() as temporary:
                directory = args.models_dir / name if args.models_dir else Path(temporary)
                found[name] = {"command": command, **measure_shape(shapes[name], directory, args)}
        results = args.output_dir / RESULTS_FILE
        before = read_json(results)["shapes"] if results.exists() else {}
        write_json(results, {"shapes": {name: (before | found)[name] for name in SHAPES if name in before | found}})
        show(found)

    return run_command(parser.prog, measure)


def measure_shape(config: dict, directory: Path, args: argparse.Namespace) -> dict:
    """What a dense model of this config.json came to; `directory` gets the models. Raises InputError when a command
    fails."""
    dense, checkpoint, pruned, speed = (directory / name for name in ("dense", "ckpt", "pruned", "speed"))
    write_random_model(config, dense, DTYPE)
    target = ["--target-speedup", args.speedup, "--at", args.at]
    engines = ["--repeats", args.repeats, "--rounds", args.rounds, "--dtype", DTYPE, "--cases", args.at]
    models = ["--dense", dense, "--pruned", pruned, "--output-dir", speed]
    commands = [
        run(script("learn-masks"), dense, checkpoint, "--method", "magnitude", *target, "--agreement-prompts", "0"),
        run(script("convert-pruned"), checkpoint, pruned),
        run(sys.executable, "-m", "bench.e2e_speedup", *models, *engines),
    ]
    budget, timed = read_json(checkpoint / PRUNING_FILE)["budget"], read_json(speed / "e2e_speedup.json")
    (case,) = timed["cases"]
    return {
        "commands": [text.replace(f"{directory}/", "") for text in commands],
        "budget": budget,
        "dense_parameters": timed["models"]["dense"]["parameters"],
        "predicted": budget["padded_ideal_speedup"],
        "ideal_speedup": case["ideal_speedup"],  # of what is served: the same, if both count alike
        "measured": {key: case[key] for key in MEASURED},
        "of_predicted": case["speedup"] / budget["padded_ideal_speedup"],
        "engines": {name: {key: case[name][key] for key in PROBED} for name in ("dense", "pruned")},
        "warnings": case["warnings"],
        **{key: timed[key] for key in ("settings", "machine", "versions", "hardware")},
    }


def write_random_model(config: dict, directory: Path, dtype: str) -> None:
    """A model of random weights, and a tokenizer of one word, which learn-masks loads and does not use."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=getattr(torch, dtype))
    model.save_pretrained(directory)
    one_word = Tokenizer(models.WordLevel({"word": 0}, unk_token="word"))
    PreTrainedTokenizerFast(tokenizer_object=one_word).save_pretrained(directory)


def show(shapes: dict) -> None:
    """What was asked for, predicted and measured."""
    table = numbers_table(
        "shape", "dense", "asked", "ideal", "padded\n(predicted)", "measured", "interval", "of predicted"
    )
    for name, found in shapes.items():
        budget, measured = found["budget"], found["measured"]
        table.add_row(
            name,
            f"{found['dense_parameters'] / 1e6:,.0f}M",
            f"{budget['target']['speedup']:g}x",
            f"{budget['ideal_speedup']:.3f}x",
            f"{found['predicted']:.3f}x",
            f"{measured['speedup']:.3f}x",
            interval_text(measured, "-", 3),
            f"{found['of_predicted']:.3f}",
        )
    console.print(table)
    for warning in named_warnings([{"name": name, **found} for name, found in shapes.items()]):
        console.print(warning)


if __name__ == "__main__":
    sys.exit(main())
