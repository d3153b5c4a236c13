"""bench.layouts with engines that take as long as they have parameters."""

import json
from contextlib import contextmanager
from pathlib import Path

import pytest

from bench import layouts
from bench.speed import engines
from pruned_vllm.formats.geometry import ModelGeometry


def test_variants_take_turns_and_are_set_against_the_first(monkeypatch):
    started = []

    @contextmanager
    def running(options, start_seconds):
        configs = [json.loads((Path(option["model"]) / "config.json").read_text()) for option in options]
        started.append([Path(option["model"]).name for option in options])
        start_seconds += [float(len(started))] * len(options)
        yield [ModelGeometry.from_config(config) for config in configs]

    def measured(geometries, cases, vocab_size, repeats):
        return {case: [[geometry.num_parameters / 1e9] * repeats for geometry in geometries] for case in cases}

    monkeypatch.setattr(engines, "running_engines", running)
    monkeypatch.setattr(layouts, "measure", measured)
    monkeypatch.setattr(layouts, "describe_hardware", dict)
    monkeypatch.setattr(layouts, "describe_versions", dict)
    results = layouts.compare("gqa", rounds=2, repeats=3, compile=False)
    names = ["--gqa-layout padded", "--gqa-layout compact"]
    assert started == [names, names[::-1]]
    padded, compact = results["variants"]
    assert [padded["name"], compact["name"]] == names and compact["start_seconds"] == [1.0, 2.0]
    for variant in (padded, compact):
        for case in variant["cases"]:
            assert case["samples_s"] == [variant["parameters"] / 1e9] * 6
            assert case["speed"] == case["speed_q1"] == pytest.approx(padded["parameters"] / variant["parameters"])
    assert compact["parameters"] < padded["parameters"] and compact["cases"][0]["ideal_speed"] > 1
