"""One directory means one model: learn-masks, convert-pruned and load_pruned read the same weights, or none.

Of each ugly directory all commands must read the same version of the model, and vLLM the same files, or all must refuse
with a message that names the same file.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.learning import run
from helpers.masked import RAGGED, convert_pruned
from helpers.tiny import byte_tokenizer, tiny_model, write_masked
from helpers.ugly import ACCEPTED, NORM, REFUSED, SINGLE, Ugly, adapter, saved_in_one_file_after_shards, without_prefix
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from learner.finetune.cli import main as finetune_pruned
from learner.job import Job
from learner.model.dense import load_dense
from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.masked import HEAD_MASK, MASKS_FILE, PruningInfo
from pruned_vllm.formats.weights import find_weight_files
from pruned_vllm.hf.loading import load_pruned


@pytest.fixture(scope="session")
def versions(tmp_path_factory) -> dict[str, Path]:
    """Directories with a version of the model in one file or in shards."""
    root, model = tmp_path_factory.mktemp("versions"), tiny_model("llama", 6, 6, 40)
    for version in (1, 2):
        model.model.norm.weight.fill_(version)
        model.save_pretrained(root / f"single{version}")
        model.save_pretrained(root / f"sharded{version}", max_shard_size="100KB")
    for directory in root.iterdir():
        byte_tokenizer().save_pretrained(directory)
    return {directory.name: directory for directory in root.iterdir()}


def ugly(tmp_path: Path, versions, spoil: Callable[[Ugly], object]) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    spoil(Ugly(directory, versions))
    return directory


def masks_that_remove_nothing(tmp_path: Path) -> Path:
    ckpt = tmp_path / "ckpt"
    ckpt.mkdir()
    save_file({}, ckpt / MASKS_FILE)
    PruningInfo("test", "product", "../model").write(ckpt)
    return ckpt


@pytest.mark.parametrize(("spoil", "version"), ACCEPTED.values(), ids=ACCEPTED)
def test_all_read_the_same(tmp_path, versions, spoil, version):
    directory = ugly(tmp_path, versions, spoil)
    assert run(directory, tmp_path / "learned", "--method", "random") == 0
    learned = load_dense(Job(str(directory), "random"), "cpu").model
    assert convert_pruned(masks_that_remove_nothing(tmp_path), tmp_path / "out") == 0
    (shard,) = (tmp_path / "out").glob("*.safetensors")
    with safe_open(shard, "pt") as file:
        converted = file.get_tensor(NORM)
    loaded = load_pruned(directory)
    for norm in (learned.model.norm.weight, converted, loaded.model.norm.weight):
        assert norm.unique().tolist() == [version]
    for name, tensor in loaded.named_parameters():
        assert torch.equal(tensor, learned.get_parameter(name)), name


@pytest.mark.parametrize(("spoil", "version"), ACCEPTED.values(), ids=ACCEPTED)
def test_vllm_reads_the_same_files_or_refuses(tmp_path, versions, spoil, version):
    directory = ugly(tmp_path, versions, spoil)
    loader = DefaultModelLoader(LoadConfig(load_format="hf"))  # "auto" goes by Mistral's own file where there is one
    try:
        _, files, _, _ = loader._prepare_weights(str(directory), None, None, True, None)
    except FileNotFoundError as error:
        assert spoil is saved_in_one_file_after_shards and "referenced in index but missing" in str(error)
    else:
        assert {Path(file) for file in files} == set(find_weight_files(directory))


@pytest.mark.parametrize(("spoil", "named"), REFUSED.values(), ids=REFUSED)
def test_all_refuse_and_name_the_same(tmp_path, capsys, versions, spoil, named):
    directory = ugly(tmp_path, versions, spoil)
    ckpt, messages = masks_that_remove_nothing(tmp_path), []
    assert run(directory, tmp_path / "learned", "--method", "random") == 2
    messages.append(capsys.readouterr().err)
    assert convert_pruned(ckpt, tmp_path / "out") == 2
    messages.append(capsys.readouterr().err)
    with pytest.raises(InputError) as error:
        load_pruned(directory)
    for message in (*messages, str(error.value)):
        assert named in message and "Traceback" not in message
    assert {path.name for path in tmp_path.iterdir()} == {"model", "ckpt"}


@pytest.mark.parametrize("beside", ["pytorch_model.bin", "model.gguf", "consolidated.00.pth", "adapter_config.json"])
@pytest.mark.parametrize("option", [True, False], ids=["--base-model", "pruning.json"])
def test_weights_beside_the_masks_are_not_passed_over(tmp_path, capsys, versions, beside, option):
    ugly(tmp_path, versions, lambda d: d.put("single1"))
    ckpt = masks_that_remove_nothing(tmp_path)
    (ckpt / beside).write_bytes(b"x")
    arguments = ("--base-model", tmp_path / "model") if option else ()
    assert convert_pruned(ckpt, tmp_path / "out", *arguments) == 2
    assert f"{ckpt} holds {beside}, which would be ignored" in capsys.readouterr().err
    (ckpt / beside).unlink()
    assert convert_pruned(ckpt, tmp_path / "out", *arguments) == 0


def test_masks_alone_do_not_stand_for_weights(tmp_path, capsys):
    ckpt = masks_that_remove_nothing(tmp_path)
    PruningInfo("test", "product").write(ckpt)
    (ckpt / "pytorch_model.bin").write_bytes(b"x")
    assert convert_pruned(ckpt, tmp_path / "out") == 2
    assert "pytorch_model.bin" in capsys.readouterr().err


@pytest.mark.parametrize("model_type", ["qwen3", "mixtral", "qwen2_moe"])
def test_names_without_prefix_give_the_same_model(tmp_path, model_type):
    """As published embedding models have them: tied, so without an lm_head."""
    model = tiny_model(model_type, 6, 3, 40, tie_word_embeddings=True)
    named = Ugly(tmp_path / "model", {})
    model.save_pretrained(named.directory)
    byte_tokenizer().save_pretrained(named.directory)
    ckpt = masks_that_remove_nothing(tmp_path)
    head = torch.tensor([1.0, 0, 0, 1, 1, 1])
    save_file({HEAD_MASK.format(1): head}, ckpt / MASKS_FILE)
    assert convert_pruned(ckpt, tmp_path / "expected") == 0
    named.rename(without_prefix)
    assert not any(name.startswith("model.") for name in load_file(named.path(SINGLE)))
    learned = load_dense(Job(str(named.directory), "random"), "cpu").model
    assert all(torch.equal(tensor, model.get_parameter(name)) for name, tensor in learned.named_parameters())
    assert convert_pruned(ckpt, tmp_path / "out") == 0
    assert (tmp_path / "out" / SINGLE).read_bytes() == (tmp_path / "expected" / SINGLE).read_bytes()


def test_finetune_pruned_refuses_too(tmp_path, capsys):
    write_masked(tmp_path / "ckpt", tiny_model("llama", 6, 6, 40), RAGGED)
    assert convert_pruned(tmp_path / "ckpt", tmp_path / "out") == 0
    adapter(Ugly(tmp_path / "out", {}))
    assert finetune_pruned([str(tmp_path / "out"), str(tmp_path / "tuned"), "--data", "text.txt"]) == 2
    assert "adapter_config.json: Transformers would add" in capsys.readouterr().err
