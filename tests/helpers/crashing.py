"""Kills a command at random moments while it writes, and looks at what is left. A script for tests/test_crashes.py:

    python -m helpers.crashing convert-pruned --kills 50 --seed 1 --directory /tmp/crash

Children are forked from this process, which has imported torch and started no thread, so that a run takes a fraction of
a second. Each is killed at a random moment after its partial directory has appeared. With --command it is the installed
command that runs, imports and all.
"""

import argparse
import hashlib
import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from helpers.killing import ending_of, in_child
from helpers.masked import ragged_checkpoint
from helpers.tiny import byte_tokenizer
from safetensors import safe_open
from tqdm import tqdm

from converter import cli as converter_cli
from converter.quantize import command as quantize_command
from converter.quantize import library  # noqa: F401  before a child is forked, which takes seconds else
from learner import cli as learner_cli
from learner.finetune import cli as finetune_cli
from pruned_vllm.hf.loading import load_pruned

POLL_SECONDS = 0.0002


def arguments_of(command: str, directory: Path, variant: int) -> list[str]:
    """Arguments of `command` that make one of two different outputs, in `directory`/out."""
    out, text = str(directory / "out"), str(directory / "text.txt")
    if command == "convert-pruned":
        return [str(directory / "ckpt"), out, "--align", str((1, 8)[variant])]
    if command == "quantize-pruned":
        return [str(directory / "model"), out, "--scheme", ("w8a8-int8", "w4a16")[variant]]
    if command == "learn-masks":
        return [str(directory / "ckpt"), out, "--method", "magnitude", "--sparsity", str((0.5, 0.3)[variant])]
    small = ["--steps", "1", "--batch-size", "1", "--sequence-length", "16", "--device", "cpu"]
    return [str(directory / "model"), out, "--data", text, "--seed", str(variant), *small]


MAINS = {
    "convert-pruned": converter_cli.main,
    "quantize-pruned": quantize_command.main,
    "learn-masks": learner_cli.main,
    "finetune-pruned": finetune_cli.main,
}


def prepare(directory: Path) -> None:
    """What the commands read."""
    ragged_checkpoint(directory / "ckpt")
    byte_tokenizer().save_pretrained(directory / "ckpt")
    (directory / "text.txt").write_text("It was the best of times, it was the worst of times. " * 50)
    assert converter_cli.main([str(directory / "ckpt"), str(directory / "model"), "--align", "1"]) == 0


def contents(out: Path) -> str:
    """A digest of the files that one variant always makes the same; the output is opened, too."""
    files = sorted([*out.glob("*.safetensors"), *out.glob("config.json"), *out.glob("pruning.json")])
    for path in out.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert all(file.get_tensor(name).isfinite().all() for name in file.keys()), path  # noqa: SIM118
    if (out / "config.json").exists() and "quantization_config" not in (out / "config.json").read_text():
        with torch.no_grad():
            assert load_pruned(out)(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()


def leftovers(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if path.name.startswith(".out.") or path.name == "out.unfinished"]


def is_writing(directory: Path) -> bool:
    return any(name.startswith(".out.") for name in os.listdir(directory))


def start(command: str, arguments: list[str], as_command: bool) -> int:
    """The pid of a child that runs the command."""

    def run() -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if as_command:
            executable = Path(sys.executable).with_name(command)
            os.execv(executable, [str(executable), *arguments])
        code = MAINS[command](arguments)
        assert code == 0, f"exit code {code}"

    return in_child(run)


def write(command: str, arguments: list[str], as_command: bool) -> None:
    """Runs the command to its end."""
    ending = ending_of(start(command, [*arguments, "--overwrite"], as_command))
    assert ending == 0, f"{command} ended with {ending}"


def killed_after(command: str, arguments: list[str], directory: Path, delay: float, as_command: bool) -> float | None:
    """Runs and kills the command `delay` seconds after it has begun to write.

    Returns None, or the seconds that it wrote for where it ended its writing first.
    """
    pid = start(command, arguments, as_command)
    ended: list[int] = []

    def alive() -> bool:
        if not ended and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            ended.append(pid)
        return not ended

    while alive() and not is_writing(directory):
        time.sleep(POLL_SECONDS)
    began = time.perf_counter()
    while is_writing(directory) and time.perf_counter() - began < delay:
        time.sleep(POLL_SECONDS)
    seconds, ended_writing = time.perf_counter() - began, not is_writing(directory)
    if not ended_writing:
        os.kill(pid, signal.SIGKILL)
    ending = ending_of(pid)
    assert ending in (0, -signal.SIGKILL), f"{command} ended with {ending}"
    return seconds if ended_writing else None


def crash(command: str, directory: Path, kills: int, seed: int, as_command: bool) -> str:
    """Kills `command` until `kills` have hit it. Raises AssertionError where something is lost or left."""
    chance, out = random.Random(seed), directory / "out"
    prepare(directory)
    known = []
    for variant in (0, 1):
        write(command, arguments_of(command, directory, variant), as_command)
        known.append(contents(out))
    assert known[0] != known[1]
    (out / "notes.txt").write_text("mine")
    durations = [
        killed_after(command, [*arguments_of(command, directory, 1), "--overwrite"], directory, 1e9, as_command)
        for _ in range(2)
    ]
    longest, hits, misses, found = min(durations) * 1.05, 0, 0, {"none": 0, "old": 0, "new": 0, "leftover": 0}
    while hits < kills:
        assert misses < 3 * kills + 10, f"seed {seed}: {misses} runs ended before they were killed"
        overwrite = chance.random() < 0.7
        if not overwrite:
            shutil.rmtree(out)
        new = chance.randrange(2)
        before = contents(out) if overwrite else None
        arguments = arguments_of(command, directory, new)
        delay = chance.uniform(0, longest)
        missed = killed_after(command, [*arguments, *["--overwrite"] * overwrite], directory, delay, as_command)
        where = f"seed {seed}, kill {hits}, {'with' if overwrite else 'without'} --overwrite, after {delay:.4f} s"
        hits, misses = hits + (missed is None), misses + (missed is not None)
        assert out.exists() or not overwrite, f"{where}: OUT is gone"
        if out.exists():
            now = contents(out)
            assert now in (before, known[new]), f"{where}: OUT is neither old nor new"
            assert not overwrite or (out / "notes.txt").read_text() == "mine", where
            found["old" if now == before != known[new] else "new"] += missed is None
        else:
            found["none"] += 1
        found["leftover"] += any(path.suffix == ".partial" for path in leftovers(directory))
        write(command, arguments_of(command, directory, 1 - new), as_command)
        assert contents(out) == known[1 - new], f"{where}: the next run"
        assert not leftovers(directory), f"{where}: {leftovers(directory)} after the next run"
        assert not overwrite or (out / "notes.txt").read_text() == "mine", f"{where}: the next run"
        (out / "notes.txt").write_text("mine")
    assert found["leftover"] > kills / 4, f"too few kills hit the writing: {found}"
    return f"{command}: {hits} kills within {longest:.3f} s of writing, {misses} came too late; found {found}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=MAINS)
    parser.add_argument("--kills", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--command", action="store_true")
    args = parser.parse_args()
    # A killed child may hold a lock that it shares with this process. tqdm's is for processes by default.
    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0
    started = time.perf_counter()
    print(f"seed {args.seed}", flush=True)
    print(crash(args.name, args.directory, args.kills, args.seed, args.command))
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
