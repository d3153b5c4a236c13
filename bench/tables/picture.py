"""Draws the figures of README.md's table: speedups against the ideal ones.

    python -m bench.tables.picture     # writes bench/results/speedup.png

The figures are in the file too, so that a test can tell when the picture is older than the results.
"""

import json
import sys

from bench.speed.report import plot_speedups
from bench.tables.headline import MODELS
from bench.tables.markdown import RESULTS, case_name, millions, results

PICTURE = RESULTS / "speedup.png"
FIGURES = ("speedup", "speedup_q1", "speedup_q3", "ideal_speedup")


def main() -> int:
    plot_speedups(cases(), PICTURE, metadata={"Description": figures()})
    print(f"written: {PICTURE}")
    return 0


def cases() -> list[dict]:
    """What is drawn: cases of bench.e2e_speedup under names for readers."""
    found = []
    for directory in MODELS.values():
        measured = results(f"{directory}/e2e_speedup.json")
        kind = "Qwen3-MoE" if "moe" in directory else "Llama"
        sizes = " to ".join(millions(model["parameters"]) for model in measured["models"].values())
        for case in measured["cases"]:
            found.append({**case, "name": f"{case_name(case, tokens=False)}\n{kind}\n{sizes}"})
    return found


def figures() -> str:
    """What the picture shows, as JSON."""
    return json.dumps([[case["name"], *(round(case[key], 4) for key in FIGURES)] for case in cases()])


if __name__ == "__main__":
    sys.exit(main())
