"""What is copied beside the weights: what consumers read, no code, nothing from outside of the directory."""

import importlib
import inspect
import json
import os

import pytest

from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.companions import COMPANIONS, DOWNLOADED, copy_companions, find_companions, tokenizer_code

POOLING, NORMALIZE, DENSE, TRANSFORMER = (
    f"sentence_transformers.models.{name}" for name in ("Pooling", "Normalize", "Dense", "Transformer")
)
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": TRANSFORMER},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": POOLING},
    {"idx": 2, "name": "2", "path": "2_Dense", "type": DENSE},
    {"idx": 3, "name": "3", "path": "3_Normalize", "type": NORMALIZE},
]


def fill(directory, *names, content: str = "{}"):
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(content)
    return directory


@pytest.fixture
def embedding_model(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "modules.json").write_text(json.dumps(MODULES))
    return fill(
        tmp_path / "model", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "config.json"
    )


def test_what_consumers_read_is_copied_byte_for_byte(tmp_path):
    read = [
        "LICENSE.txt",
        "added_tokens.json",
        "additional_chat_templates/tools.jinja",
        "chat_template.jinja",
        "config_sentence_transformers.json",
        "generation_config.json",
        "merges.txt",
        "qwen.tiktoken",
        "sentence_bert_config.json",
        "special_tokens_map.json",
        "spiece.model",
        "tekken.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer.model.v3",
        "tokenizer_config.json",
        "vocab.json",
    ]
    others = [
        "README.md",
        "config.json",
        "hf_quant_config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "modeling_x.py",
        "optimizer.pt",
        "original/tokenizer.model",
        "params.json",
        "pruning.json",
        "pytorch_model.bin",
        "tokenization_x.py",
        "tokenizer.py",
        "tokenizer_config.json.py",
        "vocab.py",
    ]
    source = fill(tmp_path / "model", *read, *others, content='{"temperature": 0.6,\r\n "do_sample": false}  ')
    (tmp_path / "out").mkdir()
    assert find_companions(source) == sorted(read)
    copy_companions(source, tmp_path / "out")
    copies = {path.relative_to(tmp_path / "out").as_posix(): path for path in (tmp_path / "out").rglob("*.*")}
    assert {name for name, path in copies.items() if path.is_file()} == set(read)
    assert all(path.read_bytes() == (source / name).read_bytes() for name, path in copies.items() if path.is_file())


def test_modules_of_sentence_transformers_are_copied(tmp_path, embedding_model):
    (tmp_path / "out").mkdir()
    fill(embedding_model, "1_Pooling/evil.py", "4_Unnamed/config.json")
    copy_companions(embedding_model, tmp_path / "out")
    assert {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")} == {
        "modules.json",
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
    }


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([{"path": "../elsewhere", "type": POOLING}], "path '../elsewhere' is no directory below it"),
        ([{"path": "/etc", "type": POOLING}], "path '/etc' is no directory below it"),
        ([{"path": 1, "type": POOLING}], "path 1 is no directory below it"),
        ([{"path": "5_Pooling", "type": POOLING}], "5_Pooling: missing, but modules.json names it"),
        ([{"path": "0_Transformer", "type": TRANSFORMER}], "the transformer is in 0_Transformer/"),
        (["1_Pooling"], "modules.json: holds no list of modules"),
        ({"modules": None}, "modules.json: holds no list of modules"),
        ("1_Pooling", "must hold a JSON object or list, not a str"),
    ],
)
def test_bad_modules_are_refused(embedding_model, modules, message):
    (embedding_model / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(InputError, match=message):
        find_companions(embedding_model)


@pytest.mark.parametrize("path", ["", ".", "./"])
def test_a_module_that_is_the_model_itself_adds_no_weights(embedding_model, path):
    (embedding_model / "modules.json").write_text(json.dumps([{"path": path, "type": TRANSFORMER}]))
    fill(embedding_model, "model.safetensors")
    assert find_companions(embedding_model) == ["modules.json"]


def test_pickled_modules_are_refused(embedding_model):
    """vLLM would go on without the projection where its weights are missing."""
    (embedding_model / "2_Dense" / "model.safetensors").rename(embedding_model / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(InputError, match="pytorch_model.bin: pickled weights are neither read nor copied"):
        find_companions(embedding_model)


def test_symlinks_that_lead_out_are_refused(tmp_path, embedding_model):
    secret = fill(tmp_path, "secret/config.json") / "secret"
    fill(embedding_model, "vocab.json")
    (embedding_model / "evil.txt").symlink_to("/etc/passwd")  # no companion, so nobody minds
    (embedding_model / "tokenizer.json").symlink_to(secret / "config.json")
    (embedding_model / "vocab.txt").symlink_to("vocab.json")  # inside
    (embedding_model / "1_Pooling" / "config.json").unlink()
    (embedding_model / "1_Pooling").rmdir()
    (embedding_model / "1_Pooling").symlink_to(secret)
    with pytest.raises(InputError) as error:
        find_companions(embedding_model)
    assert [problem.partition(" is a symlink to ")[0].rpartition("/model/")[2] for problem in error.value.problems] == [
        "1_Pooling/config.json",
        "tokenizer.json",
    ]


def test_downloads_of_the_hub_are_copied(tmp_path):
    """Their files are symlinks to blobs, and those may be symlinks to blobs that repositories share."""
    repository = tmp_path / "models--org--name"
    snapshot = fill(repository / "snapshots" / "0123", "README.md")
    fill(repository / "blobs", "a1")
    fill(tmp_path / "blobs" / "ff", "ff12")
    (repository / "blobs" / "b2").symlink_to("../../blobs/ff/ff12")
    (snapshot / "1_Pooling").mkdir()
    (snapshot / "tokenizer.json").symlink_to("../../blobs/a1")
    (snapshot / "1_Pooling" / "config.json").symlink_to("../../../blobs/b2")
    (snapshot / "modules.json").write_text(json.dumps(MODULES[:2]))
    (tmp_path / "cache").symlink_to(tmp_path)
    for directory in (snapshot, tmp_path / "cache" / snapshot.relative_to(tmp_path)):
        assert find_companions(directory) == ["1_Pooling/config.json", "modules.json", "tokenizer.json"]
    (repository / "blobs" / "a1").unlink()
    (repository / "blobs" / "a1").symlink_to("/etc/passwd")
    with pytest.raises(InputError, match="tokenizer.json is a symlink to /etc/passwd"):
        find_companions(snapshot)


def test_pipes_and_directories_are_no_companions(tmp_path):
    os.mkfifo(tmp_path / "tokenizer.json")
    (tmp_path / "vocab.json").mkdir()
    assert find_companions(tmp_path) == []


@pytest.mark.parametrize(
    ("auto_map", "code"),
    [
        (None, None),
        ({"AutoConfig": "configuration_x.XConfig"}, None),
        ({"AutoTokenizer": ["tokenization_x.X", None]}, "tokenization_x.X"),
        ({"AutoTokenizer": [None, "tokenization_x.XFast"]}, "tokenization_x.XFast"),
        (["tokenization_x.X", None], "tokenization_x.X"),
        ({"AutoTokenizer": "org/name--tokenization_x.X"}, "org/name--tokenization_x.X"),
    ],
)
def test_a_tokenizer_that_is_code_is_recognized(tmp_path, auto_map, code):
    assert tokenizer_code(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map}))
    assert tokenizer_code(tmp_path) == code


def matches(name: str, patterns=COMPANIONS) -> bool:
    from huggingface_hub.utils import filter_repo_objects

    return bool(list(filter_repo_objects([name], allow_patterns=list(patterns))))


def test_files_of_every_tokenizer_of_transformers_are_companions():
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

    classes = {name: tokenizer_class_from_name(name) for name in set(TOKENIZER_MAPPING_NAMES.values()) if name}
    names = {file for found in classes.values() for file in getattr(found, "vocab_files_names", {}).values()}
    assert len(names) > 20
    assert not [name for name in names if not matches(name)]


def test_files_that_vllm_reads_of_sentence_transformers_are_downloaded():
    config = importlib.import_module("vllm.transformers_utils.config")
    source = inspect.getsource(config.get_sentence_transformer_tokenizer_config)
    names = [line.strip().strip('",') for line in source.splitlines() if line.strip().startswith('"sentence_')]
    assert len(names) > 5
    for name in (*names, "modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors"):
        assert matches(name, DOWNLOADED), name
    assert not matches("2_Dense/pytorch_model.bin", DOWNLOADED) and not matches("model.safetensors", DOWNLOADED)


@pytest.mark.parametrize("name", ["tokenizer.json", "merges.txt", "spiece.model"])
def test_a_link_whose_target_is_missing_is_refused(tmp_path, name):
    """Of a cache that lost a blob; without the file the model would read other text."""
    (tmp_path / name).symlink_to("../../blobs/0123")
    with pytest.raises(InputError) as error:
        find_companions(tmp_path)
    assert error.value.problems == (
        f"{tmp_path / name} is a link to ../../blobs/0123, which is missing; download it again",
    )
