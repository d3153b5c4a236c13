"""--data self: what the dense model writes, kept from run to run, and mixed with other text."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.chat import with_template
from helpers.learning import run
from helpers.limits import files_of_at_most
from helpers.tiny import byte_tokenizer, converted, masks_for, tiny_model

from learner.data import self_generated
from learner.data.prompts import shuffled_prompts
from learner.data.self_generated import self_generated_tokens
from learner.data.text import training_blocks
from learner.finetune import cli as finetune_cli
from learner.job import Job
from learner.model.dense import load_dense
from pruned_vllm.common.errors import InputError

END = 93  # "~"
CALIBRATION = ["--calibration-sequences", 8, "--sequence-length", 32, "--device", "cpu", "--agreement-prompts", 0]


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(self_generated, "BATCH_SIZE", 4)
    monkeypatch.setattr(self_generated, "ANSWER_TOKENS", 20)


@pytest.fixture
def directory(tmp_path) -> Path:
    tiny_model("llama", 6, 3, 40).save_pretrained(tmp_path / "dense")
    with_template(byte_tokenizer()).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def written(monkeypatch):
    """Prompts of every call that generates."""
    generate, calls = self_generated.generate, []

    def counted(model, prompts, *args, **kwargs):
        calls.append(prompts)
        return generate(model, prompts, *args, **kwargs)

    monkeypatch.setattr(self_generated, "generate", counted)
    return calls


def dense_of(directory: Path):
    return load_dense(Job(model=str(directory), method="magnitude"), "cpu")


def process(index: int = 0, number: int = 1):
    return SimpleNamespace(process_index=index, num_processes=number, is_main_process=index == 0)


def tokens_of(directory, count, seed=42, place=None) -> list[int]:
    return self_generated_tokens(dense_of(directory), count, seed, place or process(), show_progress=False).tolist()


def test_documents_are_prompts_with_answers_and_end(directory, written):
    ids = tokens_of(directory, 900)
    assert len(ids) == 900
    text = byte_tokenizer().decode(ids)
    documents = [part for part in text.split("<user>") if part]
    for prompt, document in zip(shuffled_prompts(42), documents[:-1], strict=False):
        assert document.startswith(f"{prompt}~<assistant>") and document.endswith("~")
        assert len(document) > len(f"{prompt}~<assistant>~")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(directory)  # a base model
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    assert byte_tokenizer().decode(tokens_of(directory, 200)).startswith(shuffled_prompts(42)[0])


def test_what_was_written_is_kept_and_added_to(directory, written, tmp_path):
    first = tokens_of(directory, 300)
    before = len(written)
    assert tokens_of(directory, 300) == first and len(written) == before
    assert tokens_of(directory, 800)[:300] == first and len(written) > before
    batches = sorted((tmp_path / "cache").rglob("*.json"))
    assert [path.name for path in batches] == [f"{index:06}.json" for index in range(len(written))]
    for path in batches[1:]:
        path.unlink()
    assert tokens_of(directory, 300) == first, "a batch depends on its number alone"
    before = len(written)
    assert tokens_of(directory, 300, seed=7) != first and len(written) > before
    tiny_model("llama", 6, 3, 40, seed=1).save_pretrained(directory)
    assert tokens_of(directory, 300) != first, "another model"


def test_a_gpu_writes_several_batches_together(directory, written, monkeypatch, tmp_path):
    alone = tokens_of(directory, 300)
    monkeypatch.setattr(self_generated._Writer, "_batches", lambda writer: 3)
    written.clear()
    longer = tokens_of(directory, 1500)
    assert longer[:300] == alone, "what was written one by one is read"
    assert written and {len(prompts) for prompts in written} == {12}
    batches = sorted((tmp_path / "cache").rglob("*.json"))
    assert len(batches) % 3 == 0 and {len(json.loads(path.read_text())["documents"]) for path in batches} == {4}
    written.clear()
    monkeypatch.setattr(self_generated._Writer, "_batches", lambda writer: 1)
    assert tokens_of(directory, 1500) == longer and not written, "and the other way round"


def test_an_interrupted_run_goes_on_behind_its_last_batch(directory, written, monkeypatch):
    generate, calls = self_generated.generate, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*args, **kwargs)

    monkeypatch.setattr(self_generated, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokens_of(directory, 900)
    monkeypatch.setattr(self_generated, "generate", generate)
    written.clear()
    after = tokens_of(directory, 900)
    assert [len(prompts) for prompts in written] == [4] * len(written)
    resumed = len(written)
    for path in Path(os.environ["XDG_CACHE_HOME"]).rglob("*.json"):
        path.unlink()
    written.clear()
    assert tokens_of(directory, 900) == after and len(written) == resumed + 2


def test_processes_write_shares_and_read_the_same(directory, written):
    alone = tokens_of(directory, 900)
    for path in Path(os.environ["XDG_CACHE_HOME"]).rglob("*.json"):
        path.unlink()
    written.clear()
    assert tokens_of(directory, 900, place=process(1, 2)) == alone
    by_second = len(written)
    assert tokens_of(directory, 900, place=process(0, 2)) == alone
    assert len(written) - by_second <= 1, "the first found what the second had written"


def test_of_two_that_write_the_same_batch_one_counts(directory, monkeypatch):
    """As with numbers that differ in the last bit from machine to machine."""
    generate = self_generated.generate

    def slow(*args, **kwargs):
        answers = generate(*args, **kwargs)
        monkeypatch.setattr(self_generated, "generate", generate)
        first.append(tokens_of(directory, 100))
        return [[1, 2, 3] for _ in answers]

    first: list[list[int]] = []
    monkeypatch.setattr(self_generated, "generate", slow)
    assert tokens_of(directory, 100) == first[0]
    assert not [
        path for path in Path(os.environ["XDG_CACHE_HOME"]).rglob("*") if path.is_file() and path.suffix != ".json"
    ]


def test_self_is_half_of_a_mixture(directory, tmp_path):
    text, dense = tmp_path / "text.txt", dense_of(directory)
    for characters in (400, 40_000):  # less, and much more than the model writes
        text.write_text("x" * characters)
        job = Job(model=str(directory), method="wanda", data=["self", str(text)], self_tokens=2000)
        blocks = training_blocks(dense.model, dense.tokenizer, job, 32, 500, dense, process()).blocks
        foreign = (blocks == byte_tokenizer().convert_tokens_to_ids("x")).all(1)
        assert foreign.float().mean() == 0.5, characters
        longest = max(characters // 32, 2000 // 32)
        assert len(blocks) == 2 * longest


def test_text_that_is_too_short_to_be_half_is_refused_before_the_model_writes(directory, written, tmp_path):
    text, dense = tmp_path / "text.txt", dense_of(directory)
    text.write_text("x" * 20)
    job = Job(model=str(directory), method="wanda", data=["self", str(text)], self_tokens=2000)
    with pytest.raises(InputError, match=r"text.txt: 20 tokens, fewer than one block of 32, cannot be half"):
        training_blocks(dense.model, dense.tokenizer, job, 32, 500, dense, process())
    assert not written


def test_a_run_writes_no_more_than_it_reads(directory, written):
    dense = dense_of(directory)
    job = Job(model=str(directory), method="wanda", data=["self"])
    blocks = training_blocks(dense.model, dense.tokenizer, job, 32, 10, dense, process())
    assert blocks.blocks.shape == (10, 32)


def test_commands(directory, tmp_path, capsys):
    """learn-masks, then finetune-pruned with what learn-masks has written."""
    ckpt, text = tmp_path / "ckpt", tmp_path / "text.txt"
    text.write_text("It was the best of times. " * 20)
    options = ["--method", "wanda", "--sparsity", 0.3, "--eval-data", text, *CALIBRATION[:-2], "--agreement-prompts", 3]
    assert run(directory, ckpt, "--data", "self", "--self-tokens", 500, *options) == 0
    results = json.loads((ckpt / "learning.json").read_text())["results"]
    assert results["agreement_kl"] > 0 and 0 <= results["agreement_tokens"] < results["answer_tokens"] <= 48
    assert "agreement kl" in capsys.readouterr().out
    assert (
        run(directory, tmp_path / "other", "--data", text, "--eval-data", "self", "--method", "wanda", *CALIBRATION)
        == 2
    )
    assert "--eval-data self" in capsys.readouterr().err

    out = converted(tmp_path / "work", tiny_model("llama", 6, 3, 40), masks_for([[1, 1, 0, 0, 1, 1]] * 3, []))
    with_template(byte_tokenizer()).save_pretrained(out)
    small = [
        "--steps",
        "4",
        "--batch-size",
        "2",
        "--sequence-length",
        "32",
        "--device",
        "cpu",
        "--learning-rate",
        "0.01",
    ]
    small += ["--agreement-prompts", "3"]
    arguments = [str(out), str(tmp_path / "recovered"), "--data", "self", str(text), *small]
    assert finetune_cli.main(arguments) == 2
    assert "say with --teacher" in capsys.readouterr().err and not (tmp_path / "recovered").exists()
    assert finetune_cli.main([*arguments, "--teacher", str(directory)]) == 0
    results = json.loads((tmp_path / "recovered" / "finetuning.json").read_text())["results"]
    assert results["agreement_kl_after"] < results["agreement_kl_before"]
    assert {"agreement_tokens_before", "agreement_tokens_after", "answer_tokens"} < results.keys()


def test_a_model_that_cannot_be_asked_is_refused(directory, tmp_path, capsys):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no users') }}"
    tokenizer.save_pretrained(directory)
    assert run(directory, tmp_path / "ckpt", "--data", "self", "--method", "wanda", *CALIBRATION) == 2
    assert "chat template cannot be used" in capsys.readouterr().err and not (tmp_path / "ckpt").exists()


def test_random_numbers_of_a_run_do_not_depend_on_the_cache(directory):
    torch.manual_seed(5)
    expected = torch.rand(3)
    for _ in range(2):  # written, then read
        torch.manual_seed(5)
        tokens_of(directory, 200)
        assert torch.equal(torch.rand(3), expected)


DAMAGED = ["", "[]", "{}", *(f'{{"documents": {value}}}' for value in ("[]", "[[]]", "[[1, 999]]", "[[-1]]", '"a"'))]


def test_a_damaged_batch_is_named(directory):
    tokens_of(directory, 100)
    (path,) = list(Path(os.environ["XDG_CACHE_HOME"]).rglob("000000.json"))
    for content in DAMAGED:
        path.write_text(content)
        with pytest.raises(InputError, match=f"000000.json.*; delete {path.parent}"):
            tokens_of(directory, 100)


def test_a_cache_that_cannot_be_written_is_named_and_holds_nothing(directory, tmp_path):
    with files_of_at_most(300), pytest.raises(InputError, match="cannot be kept in .*cache.*File too large; XDG_CACHE"):
        tokens_of(directory, 100)
    cache = tmp_path / "cache"
    assert not [path for path in cache.rglob("*") if path.is_file()]
    shutil.rmtree(cache)
    cache.write_text("a file")
    with pytest.raises(InputError, match="cannot be kept in .*Not a directory"):
        tokens_of(directory, 100)


def test_an_end_token_that_the_model_lacks_ends_nothing(directory):
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 999}))
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(directory)
    assert max(tokens_of(directory, 200)) < 256
