"""Weights in other places than whole on every device: the same masks, less memory, and runs that move between them."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.learning import geometry_of, run
from helpers.processes import COMMANDS, codes, in_processes
from helpers.tiny import tiny_model
from safetensors.torch import load_file

from learner.data import self_generated
from learner.job import Job
from learner.memory import needs
from learner.run import training
from learner.settings import DDPSettings

# As many micro batches of the same sequences in one process as in two, so that the same numbers are added.
SMALL = ["--steps", 20, "--batch-size", 4, "--micro-batch-size", 2, "--sequence-length", 32, "--device", "cpu"]
SMALL += ["--agreement-prompts", 0]
MODELS = ("llama", "qwen3_moe")


# What a run does beside learning: the model writes text and answers, and there are several budgets.
ALL = ["--sparsity", 0.3, 0.5, "--agreement-prompts", 3]
BUDGETS = ("30", "50")
SHORT = "from learner.data import self_generated\nself_generated.ANSWER_TOKENS = 20"  # else it takes long


@pytest.fixture
def models(word_model, monkeypatch):
    """The directory of the fixture word_model, with a directory of a model for each of MODELS."""
    monkeypatch.setattr(self_generated, "ANSWER_TOKENS", 20)
    monkeypatch.setenv("XDG_CACHE_HOME", str(word_model / "cache"))
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


def results_of(directory) -> dict[str, float]:
    return json.loads((directory / "learning.json").read_text())["results"]


def assert_same_results(one: Path, other: Path) -> None:
    figures = [results_of(directory) for directory in (one, other)]
    for results in figures:
        del results["learning_seconds"]
    assert figures[0] == pytest.approx(figures[1], rel=1e-4)


def compare(models, cases, *more, budgets=("",)) -> None:
    """Two processes with sharded weights learn bit for bit what one learns with whole weights.

    With LoRA nearly: masks were 2e-7 apart after 4 steps.
    """
    commands = [command(models, *case, f"two {case}", "--weights", "sharded", *more) for case in cases]
    for output in in_processes(*commands, code=SHORT + COMMANDS):
        assert codes(output) == [0] * len(cases), output.stdout + output.stderr
    shutil.rmtree(models / "cache", ignore_errors=True)  # so that one process writes its text too
    for case in cases:
        assert run(*command(models, *case, f"one {case}", *more)) == 0
        for budget in budgets:
            one, two = (models / f"{number} {case}" / budget for number in ("one", "two"))
            assert_equal(masks(one), masks(two)) if case[1] == "ddp" else assert_close(masks(one), masks(two), 1e-5)
            assert_same_results(one, two)


def test_sharded_experts_learn_the_same_masks(models):
    text = models / "text.txt"
    compare(models, [("qwen3_moe", "ddp")], *ALL, "--data", "self", text, "--eval-data", text, budgets=BUDGETS)


@pytest.mark.slow
def test_other_sharded_models_and_methods_too(models):
    compare(models, [("llama", "ddp"), ("llama", "maskprune")], "--gradient-checkpointing")
    compare(models, [("qwen3_moe", "maskprune")], "--agreement-prompts", 3)


STOPPING = """
backward = training.Training.backward
def stopping(self, *args, **options):
    if self._step == 15:
        {stop}
    return backward(self, *args, **options)
training.Training.backward = stopping
"""


def stopped(stop: str) -> str:
    """COMMANDS that execute `stop` in the middle of a step; the state is saved every 10."""
    imports, loop = COMMANDS.split("for command", 1)
    return f"{SHORT}{imports}{STOPPING.format(stop=stop)}for command{loop}"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ddp", "maskprune"])
def test_a_run_goes_on_with_another_number_of_processes(models, monkeypatch, method):
    sharded, budgets, beside = ["--weights", "sharded"], [""], []
    if method == "ddp":
        budgets, beside = BUDGETS, [*ALL, "--data", "self"]
    whole, fewer, more = (command(models, "llama", method, out, *beside) for out in ("whole", "fewer", "more"))
    assert run(*whole) == 0

    for output in in_processes([*fewer, *sharded], code=stopped("raise KeyboardInterrupt")):
        assert codes(output) == [130], output.stdout + output.stderr
    assert run(*fewer, "--resume", "--micro-batch-size", 1) == 0

    backward = training.Training.backward

    def stopping(self, *args, **options):
        if self._step == 15:
            raise KeyboardInterrupt
        return backward(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(training, "SAVE_EVERY", 10)
        patch.setattr(training.Training, "backward", stopping)
        assert run(*more) == 130
    for output in in_processes([*more, *sharded, "--resume"], code=SHORT + COMMANDS):
        assert codes(output) == [0], output.stdout + output.stderr
    for out, budget in itertools.product(("fewer", "more"), budgets):
        expected, found = (masks(models / name / budget) for name in ("whole", out))
        assert_close(expected, found, 1e-5 if method == "ddp" else 2e-3)


@pytest.mark.slow
def test_a_process_that_fails_ends_the_others(models):
    stop = "if os.environ['RANK'] == '1': raise training.torch.OutOfMemoryError('no more')"
    arguments = [*command(models, "llama", "ddp", "out"), "--weights", "sharded"]
    first, second = in_processes(arguments, code=stopped(stop))
    assert codes(second) == [2] and "the memory is not enough: no more" in second.stderr
    assert codes(first) == [2] and "another process has ended; its own message says why" in first.stderr
    assert "Traceback" not in first.stderr + second.stderr
    assert not (models / "out").exists() and (models / "out.unfinished" / "state.pt").exists()


# Looks at how much memory of its own a process takes.
MEASURED = """
from bench.resident import OwnMemory
from learner import learn
import learner.methods.ddp
memory = OwnMemory()
before = memory.now()
"""


@pytest.mark.slow
def test_a_process_holds_its_share_of_the_weights_and_what_it_computes(models, monkeypatch):
    """Its share stays where it was read, in the mapped files. Beside it there are the layers that are gathered, as many
    as --plan says, within one, and never the model."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "262144")  # what is freed is given back at once
    model = tiny_model("llama", 8, 8, 4096, hidden_size=1024, num_hidden_layers=8)
    layer = 4 * sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    model.save_pretrained(models / "llama")
    arguments = command(models, "llama", "ddp", "out", "--steps", 2, "--batch-size", 2, "--micro-batch-size", 1)
    settings = DDPSettings(steps=2, batch_size=2, micro_batch_size=1, sequence_length=32)
    job = Job("model", data=["text"], weights="sharded", settings=settings)
    planned = needs(geometry_of(model), job, 4, 32, 2, on_gpu=False).device
    expected = planned["weights, gathered"] + planned["activations"]
    for output in in_processes(
        [*arguments, "--weights", "sharded"], code=f"{MEASURED}{COMMANDS}print(memory.peak_bytes - before)"
    ):
        assert codes(output) == [0], output.stdout + output.stderr
        peak = int(output.stdout.split()[-1])
        assert peak == pytest.approx(expected, abs=layer), f"{peak / layer:.2f} layers"


@pytest.mark.slow
def test_tyr_shares_its_work(models):
    """H is a sum in another order, and solving for the weights makes its rounding 1e-4; what goes is the same."""
    options = ["--method", "tyr", "--data", models / "text.txt", "--calibration-sequences", 8, "--sequence-length", 32]
    options += ["--iterations", 2, "--generations", 2, "--offspring", 5, "--selection-tokens", 128, "--device", "cpu"]
    options += ["--agreement-prompts", 3]
    for output in in_processes([models / "qwen3_moe", models / "two", *options]):
        assert codes(output) == [0], output.stdout + output.stderr
    assert run(models / "qwen3_moe", models / "one", *options) == 0
    assert_close(masks(models / "one"), masks(models / "two"), 0)
    weights = (load_file(models / out / "model.safetensors") for out in ("one", "two"))
    assert_close(*weights, 5e-4)


@pytest.mark.parametrize(("model", "place"), [("llama", "offloaded"), ("qwen3_moe", "offloaded"), ("llama", "spread")])
def test_other_places_of_the_weights_give_the_same_masks(models, model, place):
    """Here the device is the CPU too, so only the way is tested: weights come, and go, and come again."""
    beside = [*ALL, "--data", "self", "--eval-data", models / "text.txt", "--gradient-checkpointing"]
    assert run(*command(models, model, "ddp", place, "--weights", place, *beside)) == 0
    shutil.rmtree(models / "cache")
    assert run(*command(models, model, "ddp", "whole", *beside)) == 0
    for budget in BUDGETS:
        whole, elsewhere = (models / name / budget for name in ("whole", place))
        assert_equal(masks(whole), masks(elsewhere))
        assert_same_results(whole, elsewhere)


def assert_close(one: dict, other: dict, atol: float) -> None:
    assert list(one) == list(other)
    for key, tensor in one.items():
        torch.testing.assert_close(other[key], tensor, atol=atol, rtol=0, msg=lambda text, key=key: f"{key}: {text}")
