"""Models on the hub: learn-masks and convert-pruned take the same snapshot, with what speaks against it."""

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from helpers.learning import run
from helpers.masked import convert_pruned
from helpers.tiny import byte_tokenizer, tiny_model
from safetensors.torch import save_file

from pruned_vllm.formats.masked import MASKS_FILE, PruningInfo
from pruned_vllm.hf.loading import load_pruned


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A repository of the hub; what is not asked for stays there."""
    import huggingface_hub

    repository, snapshot = tmp_path / "repository", tmp_path / "snapshot"
    tiny_model("llama", 6, 6, 40).save_pretrained(repository, max_shard_size="100KB")
    byte_tokenizer().save_pretrained(repository)

    def download(name, allow_patterns, **options):
        assert name == "owner/model"
        snapshot.mkdir(exist_ok=True)
        for file in repository.iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                (snapshot / file.name).write_bytes(file.read_bytes())
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return repository


def commands(tmp_path) -> list[int]:
    ckpt = tmp_path / "masks"
    ckpt.mkdir()
    save_file({}, ckpt / MASKS_FILE)
    PruningInfo("test", "product", "owner/model").write(ckpt)
    learned = run("owner/model", tmp_path / "learned", "--method", "random")
    return [learned, convert_pruned(ckpt, tmp_path / "out")]


def test_a_model_of_the_hub_is_learned_on_and_converted(tmp_path, hub):
    (hub / "modeling.py").write_text("raise SystemExit")
    (hub / "pytorch_model.bin").write_bytes(b"x")
    assert commands(tmp_path) == [0, 0]
    assert PruningInfo.read(tmp_path / "learned").base_model == "owner/model"
    assert not {"modeling.py", "pytorch_model.bin"} & {path.name for path in (tmp_path / "snapshot").iterdir()}


def test_an_adapter_on_the_hub_is_noticed(tmp_path, hub, capsys):
    (hub / "adapter_config.json").write_text("{}")
    assert commands(tmp_path) == [2, 2]
    assert capsys.readouterr().err.count("adapter_config.json: Transformers would add this adapter") == 2


def add_masks(repository: Path, **info) -> None:
    save_file({"model.layers.0.mlp.channel_mask": (torch.arange(40) % 2).float()}, repository / MASKS_FILE)
    PruningInfo("test", "product", **info).write(repository)


def test_a_pruned_model_of_the_hub_is_converted(tmp_path, hub, monkeypatch):
    import huggingface_hub

    add_masks(hub)
    (hub / "pytorch_model.bin").write_bytes(b"x")
    download, asked = huggingface_hub.snapshot_download, []

    def recorded(name, **given):
        asked.append(given["revision"])
        return download(name, **given)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", recorded)
    assert convert_pruned("owner/model", tmp_path / "out", "--revision", "v1") == 0
    assert asked == ["v1"] and not (tmp_path / "snapshot" / "pytorch_model.bin").exists()
    assert "base_model: owner/model\n" in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pruning"]["source"] == "owner/model"


def test_pickles_are_downloaded_where_there_is_nothing_else(tmp_path, hub, capsys):
    for path in hub.glob("*.safetensors*"):
        path.unlink()
    (hub / "pytorch_model.bin").write_bytes(b"x")
    (hub / "modeling.py").write_text("raise SystemExit")
    assert convert_pruned("owner/model", tmp_path / "out") == 2
    assert (tmp_path / "snapshot" / "pytorch_model.bin").exists()
    assert not (tmp_path / "snapshot" / "modeling.py").exists()


def cached(cache: Path, name: str, model: Path) -> str:
    """Puts a model into the cache of the hub; returns its commit."""
    commit = f"{len(name):040x}"
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(model, repository / "snapshots" / commit)
    return commit


def test_without_network_what_was_downloaded_is_converted(tmp_path, monkeypatch, capsys):
    """By the hub's own code."""
    from huggingface_hub import constants

    assert constants.is_offline_mode(), "tests/conftest.py sets HF_HUB_OFFLINE"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    model = tmp_path / "model"
    tiny_model("llama", 6, 6, 40).save_pretrained(model)
    cached(tmp_path / "cache", "owner/dense", model)
    add_masks(model)
    commit = cached(tmp_path / "cache", "owner/pruned", model)
    (tmp_path / "masks").mkdir()
    add_masks(tmp_path / "masks")
    outs = [tmp_path / f"out{number}" for number in range(3)]
    assert convert_pruned("owner/pruned", outs[0]) == 0
    assert convert_pruned("owner/pruned", outs[1], "--revision", commit) == 0
    assert convert_pruned(tmp_path / "masks", outs[2], "--base-model", "owner/dense") == 0
    assert len({(out / "model.safetensors").read_bytes() for out in outs}) == 1
    capsys.readouterr()
    assert convert_pruned("owner/other", tmp_path / "out") == 2
    assert "'owner/other' is neither a directory nor a model that can be downloaded" in capsys.readouterr().err
    assert convert_pruned("owner/pruned", tmp_path / "out", "--revision", "v2") == 2
    assert "'owner/pruned' at revision 'v2' is neither" in capsys.readouterr().err


class Hub:
    """Stands in for HfApi."""

    uploaded: dict[str, set[str]] = {}
    error: Exception | None = None

    def create_repo(self, name, exist_ok):
        assert exist_ok
        self.uploaded[name] = set()

    def upload_folder(self, repo_id, folder_path, commit_message, ignore_patterns):
        if self.error is not None:
            raise self.error
        names = {path.name for path in Path(folder_path).iterdir()}
        self.uploaded[repo_id] = {name for name in names if not any(fnmatch(name, x) for x in ignore_patterns)}


def test_a_converted_model_is_uploaded(ckpt, tmp_path, monkeypatch, capsys):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert convert_pruned(ckpt, tmp_path / "out", "--push-to-hub", "me/pruned") == 0
    assert "Uploaded to https://huggingface.co/me/pruned" in capsys.readouterr().out
    assert Hub.uploaded["me/pruned"] == {"README.md", "config.json", "generation_config.json", "model.safetensors"}


@pytest.mark.parametrize("error", [OSError("Token is required"), None], ids=["no token", "offline"])
def test_an_upload_that_fails_leaves_the_model(ckpt, tmp_path, monkeypatch, capsys, error):
    """Offline it is the hub's own code that fails."""
    import huggingface_hub

    if error is not None:
        monkeypatch.setattr(Hub, "error", error)
        monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert convert_pruned(ckpt, tmp_path / "out", "--push-to-hub", "me/pruned") == 2
    message = capsys.readouterr().err
    assert f"hf upload me/pruned {tmp_path / 'out'}" in message and "could not be uploaded" in message
    assert ("Token is required" if error else "offline mode") in message
    assert load_pruned(tmp_path / "out").config.num_attention_heads == 6


def test_nothing_is_uploaded_where_nothing_is_written(ckpt, tmp_path):
    with pytest.raises(SystemExit):
        convert_pruned(ckpt, tmp_path / "out", "--push-to-hub", "me/pruned", "--dry-run")
