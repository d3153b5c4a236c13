"""bench.conversion: what it writes is converted, and what it says of processes is so."""

import os
import sys

import pytest
from helpers.masked import convert_pruned
from safetensors.torch import load_file

from bench import conversion
from bench.conversion import CONFIG, compare, config_of, drop_caches, measure, summary, write_checkpoint
from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.hf.loading import load_pruned

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "vocab_size": 50, "num_hidden_layers": 3}


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "CHUNK_NUMBERS", 1000)
    (tmp_path / "ckpt").mkdir()
    write_checkpoint(tmp_path / "ckpt", CONFIG | SMALL)
    return tmp_path / "ckpt"


def test_the_checkpoint_is_ragged_and_finite(checkpoint, tmp_path):
    tensors = load_file(checkpoint / "model.safetensors")
    assert all(tensor.isfinite().all() and tensor.abs().max() < 2 for tensor in tensors.values())
    assert len(tensors["model.layers.1.mlp.up_proj.weight"].unique()) > 1000
    assert convert_pruned(checkpoint, tmp_path / "out") == 0
    layers = ModelGeometry.from_config(load_pruned(tmp_path / "out").config.to_dict()).layers
    assert len(set(layers)) == 3 and all(layer.num_attention_heads and layer.intermediate_size for layer in layers)


def test_layers_by_size():
    assert [config_of(size)["num_hidden_layers"] for size in (0.1, 3, 30, 138, 1000)] == [1, 1, 17, 80, 80]


def test_a_process_is_measured():
    held = "import time; held = bytearray(b'x') * 100_000_000; time.sleep(0.3)"
    run = measure([sys.executable, "-c", held])
    assert run["seconds"] > 0.3 and run["cpu_seconds"] > 0 and 100e6 < run["anonymous_bytes"] < 200e6
    assert run["resident_bytes"] >= run["anonymous_bytes"]
    with pytest.raises(InputError, match="no such thing"):
        measure([sys.executable, "-c", "raise SystemExit('no such thing')"])


def test_caches_are_dropped_file_by_file_where_no_more_is_permitted(checkpoint, monkeypatch):
    monkeypatch.setattr(conversion, "DROP_CACHES", checkpoint / "is a directory")
    (checkpoint / "is a directory").mkdir()
    monkeypatch.setattr(os, "sync", lambda: None)
    assert drop_caches(checkpoint) == "posix_fadvise of the files that are read"


def test_contestants_take_turns(checkpoint, tmp_path, monkeypatch):
    started = []

    def contestant(name, seconds):
        def run(source, target):
            assert not target.exists()
            target.mkdir()
            (target / "file").write_bytes(bytes(100))
            started.append(name)
            found = {"seconds": seconds, "resident_bytes": 5, "anonymous_bytes": 3, "read_bytes": 900}
            return found | ({"synced_seconds": 2 * seconds} if name == "cp" else {})

        return run

    monkeypatch.setattr(conversion, "measure", lambda command: {"seconds": 0.5, "anonymous_bytes": 1})
    monkeypatch.setattr(conversion, "drop_caches", lambda directory: "nothing")
    monkeypatch.setattr(
        conversion, "CONTESTANTS", {"cp": contestant("cp", 2.0), "convert-pruned": contestant("convert-pruned", 4.0)}
    )
    results = compare(checkpoint, tmp_path, repeats=2)
    assert started == ["convert-pruned", "cp", "cp", "convert-pruned"]
    found = results["summary"]
    assert found == summary(results["dry_run"], results["runs"])
    assert found["by_time"] == found["by_bytes"] == 0.5 and found["by_time_synced"] == 1
    assert found["anonymous_bytes_above_dry_run"] == 2 and results["caches_dropped_by"] == "nothing"
    assert not list(tmp_path.glob("*.out"))
