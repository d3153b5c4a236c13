"""Weights in other places than whole on every device: the same masks, less memory, and runs that move between them."""

import json

import pytest
import torch
from helpers.learning import run
from helpers.processes import codes, in_two_processes
from helpers.tiny import tiny_model
from safetensors.torch import load_file

# As many micro batches of the same sequences in one process as in two, so that the same numbers are added.
SMALL = ["--steps", 20, "--batch-size", 4, "--micro-batch-size", 2, "--sequence-length", 32, "--device", "cpu"]
MODELS = ("llama", "qwen3_moe")


@pytest.fixture
def models(word_model):
    """The directory of the fixture word_model, with a directory of a model for each of MODELS."""
    for name in MODELS:
        tiny_model(name, 6, 3, 40).save_pretrained(word_model / name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (word_model / name / file).write_bytes((word_model / "model" / file).read_bytes())
    return word_model


def command(models, name: str, method: str, out: str, *more) -> list:
    learned = [] if method == "ddp" else ["--layer-weight", "0.5"]
    return [models / name, models / out, "--method", method, "--data", models / "text.txt", *SMALL, *learned, *more]


def masks(directory) -> dict[str, torch.Tensor]:
    return load_file(directory / "pruning_masks.safetensors")


def assert_equal(one: dict, other: dict) -> None:
    assert list(one) == list(other)
    for key, mask in one.items():
        assert torch.equal(other[key], mask), f"{key}: {(other[key] - mask).abs().max()} apart"
    assert any((mask == 0).any() and (mask != 0).any() and len(mask.unique()) > 2 for mask in one.values())


def compare(models, cases, *more) -> None:
    """Two processes with sharded weights learn bit for bit what one learns with whole weights."""
    commands = [command(models, *case, f"two {case}", "--weights", "sharded", *more) for case in cases]
    for output in in_two_processes(*commands):
        assert codes(output) == [0] * len(cases), output.stdout + output.stderr
    for case in cases:
        assert run(*command(models, *case, f"one {case}", *more)) == 0
        assert_equal(*(masks(models / f"{number} {case}") for number in ("one", "two")))


def test_sharded_experts_learn_the_same_masks(models):
    compare(models, [("qwen3_moe", "ddp")], "--eval-data", models / "text.txt")
    one, two = (
        json.loads((models / f"{number} ('qwen3_moe', 'ddp')" / "learning.json").read_text())["results"]
        for number in ("one", "two")
    )
    for figure in ("dense_perplexity", "masked_perplexity"):
        assert one[figure] == pytest.approx(two[figure], rel=1e-5)


@pytest.mark.slow
def test_other_sharded_models_and_methods_too(models):
    compare(models, [("llama", "ddp"), ("llama", "maskprune"), ("qwen3_moe", "maskprune")])
    compare(models, [("llama", "ddp"), ("qwen3_moe", "maskprune")], "--gradient-checkpointing")
