"""finetune-pruned in two processes (here on the CPU, gloo): the steps of one process, also when one of them resumes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.tiny import byte_tokenizer, converted, expert_masks, masks_for, tiny_model
from safetensors.torch import load_file

from learner.finetune import cli

# Runs commands one after the other, so that the imports are paid for once. The second is interrupted in its step 7.
CODE = """
import json, os, sys
from learner.finetune import cli, finetune
finetune.SAVE_EVERY = 5
compute_loss, calls = finetune.Distillation.compute_loss, []

def stop(self, *args, **kwargs):
    calls.append(1)
    if self.args.output_dir.endswith("stopped.unfinished") and self.state.global_step == 6:
        raise KeyboardInterrupt
    return compute_loss(self, *args, **kwargs)

finetune.Distillation.compute_loss = stop
for command in json.loads(sys.argv[1]):
    code = cli.main([argument.replace("{rank}", os.environ["RANK"]) for argument in command])
    print("exit code", code, flush=True)
"""
SHARDED = ["--weights", "sharded"]
TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness. "
RAGGED = [[17, 0, 24, 5], [1, 2, 3, 4], [9, 9, 24, 1]]  # modules that may see no token in one of the processes
SMALL = ["--steps", 8, "--batch-size", 4, "--micro-batch-size", 2, "--sequence-length", 32, "--device", "cpu"]
SMALL += ["--learning-rate", 5e-3, "--kd-weight", 3, "--agreement-prompts", 3]


def in_two_processes(*commands: list) -> list[tuple[str, str]]:
    """What the first and the second print to stdout and stderr."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    text = json.dumps([[str(argument) for argument in command] for command in commands])
    processes = []
    for rank in range(2):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = os.environ | {name: str(value) for name, value in place.items()}
        command = [sys.executable, "-c", CODE, text]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes.append(subprocess.Popen(command, env=environment, text=True, **streams))
    try:
        return [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()


def make_arguments(tmp_path: Path) -> list:
    text = tmp_path / "text.txt"
    return [tmp_path / "out", "--data", text, "--eval-data", text, "--teacher", tmp_path / "ckpt", *SMALL]


def make(tmp_path: Path, widths: list[list[int]] = RAGGED) -> list:
    """A model with experts of these widths, of 24; the arguments of a command."""
    model = tiny_model("qwen3_moe", 6, 3, 24)
    masks = expert_masks(model, widths) | masks_for([[0, 0, 1, 1, 1, 1]] * 3, [])
    out, text = converted(tmp_path, model, masks), tmp_path / "text.txt"
    for directory in (out, tmp_path / "ckpt"):
        byte_tokenizer().save_pretrained(directory)
    (tmp_path / "ckpt" / "pruning.json").unlink()
    settings = {"temperature": 0.7, "do_sample": False}  # which Transformers reads, and refuses to write
    (out / "generation_config.json").write_text(json.dumps(settings))
    text.write_text(TEXT * 40)
    return make_arguments(tmp_path)


def results_of(directory: Path) -> dict:
    return json.loads((directory / "finetuning.json").read_text())["results"]


def run_in_two(
    tmp_path: Path, runs: dict[str, list], codes: list[int], *others: list, widths: list[list[int]] = RAGGED
) -> list:
    """Makes runs of these names and options in two processes, then `others`; returns what the two printed."""
    arguments = make(tmp_path, widths)
    outputs = in_two_processes(*([*arguments, tmp_path / name, *options] for name, options in runs.items()), *others)
    for number, (stdout, stderr) in enumerate(outputs):
        found = [int(line.split()[-1]) for line in stdout.splitlines() if line.startswith("exit code")]
        assert found == codes, stdout + stderr
        assert ("Wrote" in stdout) == (number == 0), "only the first writes and says so"
    return outputs


def same(ours: Path, theirs: Path, dense: Path, figures: tuple[str, ...]) -> None:
    before, *both = (load_file(directory / "model.safetensors") for directory in (dense, ours, theirs))
    assert sum(not torch.equal(tensor, before[key]) for key, tensor in both[1].items()) > 10, "nothing was trained"
    for key, tensor in both[1].items():
        torch.testing.assert_close(both[0][key], tensor, rtol=0, atol=2e-4, msg=f"{ours.name}: {key}")
    found, wanted = results_of(ours), results_of(theirs)
    for figure in figures:
        assert found[figure] == pytest.approx(wanted[figure], rel=1e-3), figure


FIGURES = ("perplexity_before", "perplexity_after", "agreement_kl_after")


def test_two_processes_train_as_one_does(tmp_path):
    out, text = tmp_path / "out", tmp_path / "text.txt"
    (tmp_path / "0.txt").write_text(TEXT)
    missing = [out, "--data", tmp_path / "{rank}.txt", *SMALL, tmp_path / "missing"]
    odd = [out, "--data", text, *SMALL, tmp_path / "odd", "--batch-size", 3]
    full = [out, "--data", text, *SMALL, tmp_path / "full", *SHARDED, "--lora-rank", 0]
    again = [*make_arguments(tmp_path), tmp_path / "two", *SHARDED]
    others = (missing, odd, full, again)
    outputs = run_in_two(tmp_path, {"two": [], "sharded": SHARDED}, [0, 0, 2, 2, 2, 2], *others)
    assert f"{tmp_path / 'two'} exists" in outputs[0][1] and f"{tmp_path / 'two'} exists" in outputs[1][1]
    assert "no multiple of --micro-batch-size 1 times the 2 processes" in outputs[1][1]
    assert "those cannot be sharded; take LoRA" in outputs[1][1]
    assert "1.txt: no such file" in outputs[0][1] and not (tmp_path / "missing").exists()
    one = [*make_arguments(tmp_path), tmp_path / "one"]
    assert cli.main([str(argument) for argument in one]) == 0
    for name in ("two", "sharded"):
        same(tmp_path / "one", tmp_path / name, out, ("loss", *FIGURES))


@pytest.mark.slow
def test_two_processes_train_all_weights_as_one_does_and_one_goes_on_for_two(tmp_path):
    all_weights = ["--lora-rank", 0]
    stopped = {"stopped": [], "sharded-stopped": SHARDED}
    run_in_two(tmp_path, {"all": all_weights, "two": [], **stopped}, [0, 0, 130, 130])
    arguments = make_arguments(tmp_path)
    assert cli.main([str(argument) for argument in [*arguments, tmp_path / "one", *all_weights]]) == 0
    same(tmp_path / "one", tmp_path / "all", tmp_path / "out", ("loss", *FIGURES))
    for name in stopped:
        assert cli.main([str(argument) for argument in [*arguments, tmp_path / name, "--resume"]]) == 0
        same(tmp_path / name, tmp_path / "two", tmp_path / "out", FIGURES)


@pytest.mark.slow
def test_experts_that_a_step_does_not_use_stay_where_they_are(tmp_path):
    """Also when they have moved before, and AdamW would let them drift on."""
    small = ["--batch-size", 2, "--micro-batch-size", 1, "--sequence-length", 8, "--steps", 12]
    run_in_two(tmp_path, {"sharded": [*small, *SHARDED]}, [0])
    one = [*make_arguments(tmp_path), tmp_path / "one", *small]
    assert cli.main([str(argument) for argument in one]) == 0
    same(tmp_path / "one", tmp_path / "sharded", tmp_path / "out", ("loss", *FIGURES))


@pytest.mark.slow
def test_sharded_experts_of_one_width_train_as_whole_ones_do_also_through_accelerate(tmp_path, monkeypatch):
    """Transformers holds them in two parameters."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    runs = {"default": ["--dtype", "bfloat16"], "sharded": [], "whole": ["--weights", "whole"]}
    run_in_two(tmp_path, runs, [0, 0, 0], widths=[[16] * 4] * 3)
    same(tmp_path / "sharded", tmp_path / "whole", tmp_path / "out", ("loss", *FIGURES))
