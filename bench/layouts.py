"""Times the ways in which convert-pruned can write one ragged model, against each other, on real vLLM.

    python -m bench.layouts gqa       # --gqa-layout compact against padded
    python -m bench.layouts align     # --align 1 against multiples
    python -m bench.layouts shapes --compile     # --max-distinct-shapes 1, 2, 4, 8 and unlimited

The model has the shape of Qwen2.5-0.5B (24 layers, 14 query heads on 2 KV heads) with random weights; each layer keeps
a share of its heads and channels that is drawn at random, one half on average, so that query groups are uneven and
widths odd. All variants live at the same time and take turns; every speed is the median of ratios to the first one in
the same round. The ideal ratio counts the bytes that a decode step reads. With --compile, start-up is timed without
any compile cache.
"""

import argparse
import json
import os
import random
import shlex
import sys
import tempfile
from pathlib import Path
from statistics import median, quantiles

from bench.e2e_speedup import describe_hardware, describe_versions
from bench.engines import engine_options, measure, running_engines
from bench.ideal import Case, decode_step_bytes
from converter.shapes import with_aligned_width, with_even_groups, with_few_shapes
from pruned_vllm.command import positive_int, run_command
from pruned_vllm.files import write_json
from pruned_vllm.geometry import LayerGeometry, ModelGeometry

# config.json of Qwen/Qwen2.5-0.5B, less what does not change a shape or a speed.
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
        return [with_aligned_width(layer, multiple, dense.dense_layers[0].intermediate_size) for layer in layers]

    def layer_bytes(layer: LayerGeometry) -> int:
        return dense.with_layers((layer,)).layer_parameters(0) * ELEMENT_BYTES

    if what == "gqa":
        even = [with_even_groups(layer) for layer in exact]
        found = {"--gqa-layout padded": aligned(even, 32), "--gqa-layout compact": aligned(exact, 32)}
    elif what == "align":
        found = {f"--align {multiple}": aligned(exact, multiple) for multiple in (1, 8, 16, 32, 64)}
    else:
        layers = aligned(exact, 32)
        found = {"unlimited": layers}
        found |= {f"--max-distinct-shapes {k}": with_few_shapes(layers, layer_bytes, k) for k in (8, 4, 2, 1)}
    return {name: dense.with_layers(tuple(layers)) for name, layers in found.items()}


def compare(what: str, repeats: int, compile: bool) -> dict:
    """Times all variants; returns what layouts.json holds, less the command."""
    dense = ModelGeometry.from_config(CONFIG)
    geometries = variants(what, dense)
    if compile:
        os.environ |= {"VLLM_DISABLE_COMPILE_CACHE": "1", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    options = engine_options(dense, CASES, load_format="dummy", dtype="bfloat16", max_model_len=128, compile=compile)
    start_seconds: list[float] = []
    with tempfile.TemporaryDirectory() as directory:
        models = []
        for number, geometry in enumerate(geometries.values()):
            models.append(f"{directory}/{number}")
            Path(models[-1]).mkdir()
            # Never the stock class, which a single shape would get: what is compared is shapes, not classes.
            config = geometry.to_config(CONFIG)
            config["architectures"] = [geometry.family.pruned_architecture]
            write_json(Path(models[-1]) / "config.json", config)
        with running_engines(models, options, start_seconds) as engines:
            samples = measure(engines, CASES, dense.vocab_size, repeats)
    reference = next(iter(geometries.values()))
    return {
        "what": what,
        "settings": {"repeats": repeats, "compile": compile, "dtype": "bfloat16"},
        "variants": [
            {
                "name": name,
                "parameters": geometry.num_parameters,
                "distinct_layer_shapes": len(set(geometry.layers)),
                "start_seconds": start_seconds[number],
                "cases": [_case_record(case, samples[case], number, geometry, reference) for case in CASES],
            }
            for number, (name, geometry) in enumerate(geometries.items())
        ],
        "versions": describe_versions(),
        "hardware": describe_hardware(),
    }


def _case_record(
    case: Case, samples: list[list[float]], number: int, geometry: ModelGeometry, reference: ModelGeometry
) -> dict:
    ratios = [first / this for first, this in zip(samples[0], samples[number], strict=True)]
    q1, _, q3 = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    ideal = decode_step_bytes(reference, case, ELEMENT_BYTES) / decode_step_bytes(geometry, case, ELEMENT_BYTES)
    return {
        "case": case.name,
        "tokens_per_s": case.num_timed_tokens / median(samples[number]),
        "speed": median(ratios),
        "speed_q1": q1,
        "speed_q3": q3,
        "ideal_speed": ideal,
        "samples_s": samples[number],
    }


def _print(results: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"speed against {results['variants'][0]['name']}")
    table.add_column("written with", no_wrap=True)
    for header in ("shapes", "parameters", "start s", *(f"{case.name} (quartiles), ideal" for case in CASES)):
        table.add_column(header, justify="right")
    for variant in results["variants"]:
        table.add_row(
            variant["name"],
            str(variant["distinct_layer_shapes"]),
            f"{variant['parameters'] / 1e6:.0f}M",
            f"{variant['start_seconds']:.0f}",
            *(
                f"{c['tokens_per_s']:.1f} tok/s {c['speed']:.2f}x ({c['speed_q1']:.2f} to {c['speed_q3']:.2f}), "
                f"{c['ideal_speed']:.2f}x"
                for c in variant["cases"]
            ),
        )
    Console().print(table)


def _run(args: argparse.Namespace) -> None:
    results = compare(args.what, args.repeats, args.compile)
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
    add("--repeats", type=positive_int, default=7, help="rounds after one warm-up; default: 7")
    add("--compile", action="store_true", help="let vLLM compile; default: eager")
    add("--output-dir", type=Path, default=Path("results"), metavar="DIR", help="created; default: results")
    args = parser.parse_args()
    return run_command(parser.prog, lambda: _run(args))


if __name__ == "__main__":
    sys.exit(main())
