"""Times the ways in which convert-pruned can write one ragged model, against each other, on real vLLM.

    python -m bench.layouts gqa       # --gqa-layout compact against padded
    python -m bench.layouts align     # --align 1 against multiples
    python -m bench.layouts shapes --compile     # --max-distinct-shapes 1, 2, 4, 8 and unlimited

The model has the shape of Qwen2.5-0.5B (24 layers, 14 query heads on 2 KV heads) with random weights; each layer keeps
a share of its heads and channels that is drawn at random, one half on average, so that query groups are uneven and
widths odd. All variants live at the same time and take turns; every speed is the median of ratios to the first one,
run by run. Two engines of the same model differ by up to 5 %, and keep doing so for as long as they live (each got
other memory); so --rounds starts all of them anew, in the opposite order. The ideal ratio counts the bytes that a
decode step reads. With --compile, start-up is timed without any compile cache.
"""

import argparse
import json
import os
import random
import shlex
import sys
import tempfile
from pathlib import Path
from statistics import median

from bench.speed.engines import engine_options, measure, measure_in_rounds
from bench.speed.ideal import Case, step_bytes
from bench.speed.results import describe_hardware, describe_versions
from bench.speed.statistics import quartiles, ratios
from converter.shapes import with_aligned_width, with_even_groups, with_few_shapes
from pruned_vllm.common.arguments import positive_int
from pruned_vllm.common.command import run_command
from pruned_vllm.common.files import write_json
from pruned_vllm.formats.config import converted_config
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.layer import LayerGeometry

# config.json of Qwen/Qwen2.5-0.5B without keys that change neither shapes nor speed.
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "num_hidden_layers": 24,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
CASES = [Case.parse("decode:1:32:64"), Case.parse("decode:8:32:64")]
ELEMENT_BYTES = 2  # bfloat16


def ragged_layers(dense: ModelGeometry, seed: int = 0) -> list[LayerGeometry]:
    """Half of the heads and channels on average; every KV head keeps 1 to all of its query heads."""
    chance = random.Random(seed)
    group, width = dense.dense_layers[0].widest_group, dense.dense_layers[0].intermediate_size
    return [
        LayerGeometry(
            tuple(chance.randint(1, group) for _ in range(dense.dense_layers[0].num_key_value_heads)),
            max(1, round(width * chance.betavariate(2, 2))),
        )
        for _ in dense.layers
    ]


def variants(what: str, dense: ModelGeometry) -> dict[str, ModelGeometry]:
    """Geometries to compare, by the option that makes convert-pruned write them."""
    exact = ragged_layers(dense)

    def aligned(layers: list[LayerGeometry], multiple: int) -> list[LayerGeometry]:
        return [with_aligned_width(layer, multiple, dense.dense_layers[0]) for layer in layers]

    def layer_bytes(layer: LayerGeometry) -> int:
        return dense.with_layers((layer,)).layer_parameters(0) * ELEMENT_BYTES

    if what == "gqa":
        even = [with_even_groups(layer) for layer in exact]
        found = {"--gqa-layout padded": aligned(even, 32), "--gqa-layout compact": aligned(exact, 32)}
    elif what == "align":
        found = {f"--align {multiple}": aligned(exact, multiple) for multiple in (1, 32, 64)}
    else:
        layers = aligned(exact, 32)
        found = {"unlimited": layers}
        found |= {f"--max-distinct-shapes {k}": with_few_shapes(layers, layer_bytes, k) for k in (8, 4, 2, 1)}
    return {name: dense.with_layers(tuple(layers)) for name, layers in found.items()}


def compare(what: str, rounds: int, repeats: int, compile: bool) -> dict:
    """Times all variants; returns what layouts.json holds, less the command."""
    dense = ModelGeometry.from_config(CONFIG)
    geometries = variants(what, dense)
    if compile:
        os.environ |= {"VLLM_DISABLE_COMPILE_CACHE": "1", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    options = engine_options(
        dense,
        CASES,
        load_format="dummy",
        dtype="bfloat16",
        max_model_len=128,
        compile=compile,
        num_engines=len(geometries),
    )
    start_seconds: list[list[float]] = [[] for _ in geometries]
    with tempfile.TemporaryDirectory() as directory:
        models = write_models(geometries, Path(directory))
        samples = measure_in_rounds(
            [{**options, "model": str(model)} for model in models],
            rounds,
            lambda engines: measure(engines, CASES, dense.vocab_size, repeats),
            start_seconds,
        )
    reference = next(iter(geometries.values()))
    return {
        "what": what,
        "settings": {"rounds": rounds, "repeats": repeats, "compile": compile, "dtype": "bfloat16"},
        "variants": [
            {
                "name": name,
                "parameters": geometry.num_parameters,
                "distinct_layer_shapes": len(set(geometry.layers)),
                "start_seconds": start_seconds[number],
                "cases": [
                    _case_record(case, samples[case][0], samples[case][number], geometry, reference) for case in CASES
                ],
            }
            for number, (name, geometry) in enumerate(geometries.items())
        ],
        "versions": describe_versions(),
        "hardware": describe_hardware(),
    }


def write_models(geometries: dict[str, ModelGeometry], directory: Path) -> list[Path]:
    """Writes config.json of each and returns their directories."""
    models = [directory / name for name in geometries]
    for model, geometry in zip(models, geometries.values(), strict=True):
        model.mkdir()
        # Equal layers would be written for the stock class, but this compares shapes, not classes.
        config = converted_config(geometry, CONFIG) | {"architectures": [geometry.family.pruned_architecture]}
        write_json(model / "config.json", config)
    return models


def _case_record(
    case: Case, reference_s: list[float], samples_s: list[float], geometry: ModelGeometry, reference: ModelGeometry
) -> dict:
    q1, speed, q3 = quartiles(ratios(reference_s, samples_s))
    ideal = step_bytes(reference, case, ELEMENT_BYTES) / step_bytes(geometry, case, ELEMENT_BYTES)
    return {
        "case": case.name,
        "tokens_per_s": case.num_timed_tokens / median(samples_s),
        "speed": speed,
        "speed_q1": q1,
        "speed_q3": q3,
        "ideal_speed": ideal,
        "samples_s": samples_s,
    }


def _print(results: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"speed against {results['variants'][0]['name']}")
    table.add_column("written with", no_wrap=True)
    for header in ("shapes", "parameters", "start s", "case", "tok/s", "speed", "quartiles", "ideal"):
        table.add_column(header, justify="right", no_wrap=True)
    for variant in results["variants"]:
        about = [
            variant["name"],
            str(variant["distinct_layer_shapes"]),
            f"{variant['parameters'] / 1e6:.0f}M",
            " ".join(f"{seconds:.0f}" for seconds in variant["start_seconds"]),
        ]
        for case in variant["cases"]:
            numbers = f"{case['speed']:.3f}x", f"{case['speed_q1']:.3f}-{case['speed_q3']:.3f}"
            table.add_row(*about, case["case"], f"{case['tokens_per_s']:.1f}", *numbers, f"{case['ideal_speed']:.3f}x")
            about = [""] * 4
    Console(width=120).print(table)


def _run(args: argparse.Namespace) -> None:
    results = compare(args.what, args.rounds, args.repeats, args.compile)
    results["command"] = shlex.join(["python", "-m", "bench.layouts", *sys.argv[1:]])
    _print(results)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path = args.output_dir / f"{args.what}.json"
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"written: {path}")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.layouts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("what", choices=("gqa", "align", "shapes"))
    add("--rounds", type=positive_int, default=2, help="times that all engines are started; default: 2")
    add("--repeats", type=positive_int, default=3, help="runs of each in a round, after one warm-up; default: 3")
    add("--compile", action="store_true", help="let vLLM compile; default: eager")
    add("--output-dir", type=Path, default=Path("results"), metavar="DIR", help="created; default: results")
    args = parser.parse_args()
    return run_command(parser.prog, lambda: _run(args))


if __name__ == "__main__":
    sys.exit(main())
