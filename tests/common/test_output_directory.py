"""convert-pruned: its output appears whole or not at all, and replaces nothing but its own."""

import errno
import json
import os
import signal
import subprocess
import sys

import pytest
from helpers.limits import files_of_at_most
from helpers.masked import CHANNELS0, convert_pruned, edit_masks, keep, overflow

from pruned_vllm.common.directories import atomic_directory
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.manifest import write_manifest


def test_existing_output_is_kept(ckpt, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    assert convert_pruned(ckpt, out) == 2
    assert "exists; choose another directory, or replace it with --overwrite" in capsys.readouterr().err
    assert convert_pruned(ckpt, out, "--overwrite") == 2  # no model that this command wrote
    assert "was not written by this command" in capsys.readouterr().err
    (out / "config.json").write_text('{"model_type": "llama"}')  # a model, but not one of ours
    assert convert_pruned(ckpt, out, "--overwrite") == 2
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "precious.txt"]


def test_output_that_appears_meanwhile_is_kept(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(InputError, match="exists"), atomic_directory(out, writer="x", overwrite=False):
        out.mkdir()
        (out / "precious.txt").write_text("mine")
    assert [path.name for path in out.iterdir()] == ["precious.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_replaces_whole_and_only_after_success(ckpt, tmp_path):
    out = tmp_path / "out"
    assert convert_pruned(ckpt, out) == 0
    (out / "notes.txt").write_text("the user's own")
    before = (out / "config.json").read_text()
    overflow(ckpt)
    assert convert_pruned(ckpt, out, "--overwrite") == 2
    assert (out / "config.json").read_text() == before
    edit_masks(ckpt, **{CHANNELS0: keep(40, 1, 2, 3)})
    assert convert_pruned(ckpt, out, "--overwrite") == 0
    assert (out / "notes.txt").read_text() == "the user's own"
    assert json.loads((out / "config.json").read_text())["per_layer_config"]["0"]["intermediate_size"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "out"]


def test_the_weights_are_never_overwritten(ckpt, capsys):
    assert convert_pruned(ckpt, ckpt, "--overwrite") == 2
    assert "was not written by this command" in capsys.readouterr().err
    write_manifest(ckpt, "convert-pruned")  # looks like a converted model
    assert convert_pruned(ckpt, ckpt, "--overwrite") == 2
    assert "which is to be converted" in capsys.readouterr().err
    assert (ckpt / "model.safetensors").exists()


@pytest.mark.parametrize("place", ["ckpt", "deep/down/ckpt"])
def test_an_output_that_contains_what_is_converted_is_refused(ckpt, tmp_path, capsys, place):
    out = tmp_path / "out"
    assert convert_pruned(ckpt, out) == 0
    (out / place).parent.mkdir(parents=True, exist_ok=True)
    ckpt.rename(out / place)
    assert convert_pruned(out / place, out, "--overwrite") == 2
    assert f"{out} contains {out / place}, which is to be converted" in capsys.readouterr().err
    (tmp_path / "masks").mkdir()  # with its weights elsewhere
    for name in ("pruning_masks.safetensors", "pruning.json"):
        (out / place / name).rename(tmp_path / "masks" / name)
    assert convert_pruned(tmp_path / "masks", out, "--base-model", out / place, "--overwrite") == 2
    assert f"{out} contains {out / place}, which is to be converted" in capsys.readouterr().err
    assert (out / place / "model.safetensors").exists()


def test_other_commands_models_are_not_replaced(ckpt, tmp_path, capsys):
    assert convert_pruned(ckpt, tmp_path / "out") == 0
    write_manifest(tmp_path / "out", "finetune-pruned")
    assert convert_pruned(ckpt, tmp_path / "out", "--overwrite") == 2
    assert "was not written by this command" in capsys.readouterr().err


def test_a_dry_run_cleans_nothing_up(ckpt, tmp_path, capsys):
    leftover = tmp_path / ".out.abcd1234.partial"
    leftover.mkdir()
    assert convert_pruned(ckpt, tmp_path / "out", "--dry-run") == 0 and leftover.exists()
    assert convert_pruned(ckpt, tmp_path / "out") == 0 and not leftover.exists()
    assert f"Removed {leftover}, which an interrupted run left" in capsys.readouterr().out


def full(descriptor, content, place):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk_leaves_nothing(ckpt, tmp_path, capsys, monkeypatch):
    with files_of_at_most(10_000):
        assert convert_pruned(ckpt, tmp_path / "out") == 2
    assert "cannot write model.safetensors: File too large" in capsys.readouterr().err
    monkeypatch.setattr(os, "pwrite", full)
    assert convert_pruned(ckpt, tmp_path / "out") == 2
    assert "cannot write model.safetensors: No space left on device" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


def test_too_little_disk_is_noticed_before_writing(ckpt, tmp_path, capsys, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 900, 100))
    assert convert_pruned(ckpt, tmp_path / "out") == 2
    assert "bytes, but its disk has 100 left" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("signum", "options"),
    [(signal.SIGINT, []), (signal.SIGTERM, []), (signal.SIGINT, ["--quantize", "w4a16"])],
    ids=["Ctrl-C", "kill", "Ctrl-C while quantizing"],
)
def test_interrupt_leaves_nothing(ckpt, tmp_path, signum, options):
    slow = (
        "import signal, sys, time, converter.writer as w; write = w.ShardFile.write\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored by what runs in the background
        "def slow(self, content, place): print('writing', flush=True); time.sleep(0.2); write(self, content, place)\n"
        "w.ShardFile.write = slow\n"
        "from converter.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", slow, ckpt, tmp_path / "out", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    while "writing" not in process.stdout.readline():
        assert process.poll() is None, "the conversion ended before it could be interrupted"
    process.send_signal(signum)
    assert process.wait(timeout=30) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]
