"""Models on the hub: learn-masks and convert-pruned take the same snapshot, with what speaks against it."""

from fnmatch import fnmatch
from pathlib import Path

import pytest
from helpers.learning import run
from helpers.masked import convert_pruned
from helpers.tiny import byte_tokenizer, tiny_model
from safetensors.torch import save_file

from pruned_vllm.formats.masked import MASKS_FILE, PruningInfo


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
