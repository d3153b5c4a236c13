"""What a run is refused for before it begins: text that the model cannot read, seeds, shards."""

import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from helpers.learning import run
from helpers.tiny import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from learner import learn
from learner.data.text import evaluation_tokens, training_blocks
from learner.finetune import cli as finetune_cli
from learner.model.perplexity import perplexity

SMALL = ["--steps", 2, "--batch-size", 2, "--sequence-length", 32, "--device", "cpu"]


def test_a_tokenizer_with_more_tokens_than_the_model_has_is_refused(word_model, capsys):  # noqa: F811
    model, text = word_model / "model", word_model / "text.txt"
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["seven"])
    tokenizer.save_pretrained(model)
    assert run(model, word_model / "ckpt", "--data", text, *SMALL) == 0, "it does not matter before it is used"
    text.write_text("1 2 seven " * 50)
    for arguments in (["--data", text, *SMALL], ["--method", "random", "--eval-data", text]):
        assert run(model, word_model / "other", *arguments) == 2
        assert "makes token 256 ('seven') of the text, but the model has embeddings for 0 to 255" in (
            capsys.readouterr().err
        )
    assert not (word_model / "other").exists()


def test_what_is_learned_from_and_scored_begins_as_a_text_does(word_model):  # noqa: F811
    """Gemma, for one, predicts next to nothing in a block without <bos>."""
    model = AutoModelForCausalLM.from_pretrained(word_model / "model")
    job = SimpleNamespace(model="model", text_column="text", split="train", seed=0)
    job.data = job.eval_data = [str(word_model / "text.txt")]
    for bos in ({}, {"bos_token": "255", "add_bos_token": True}):
        tokenizer = AutoTokenizer.from_pretrained(word_model / "model", **bos)
        expected = [255, *(i * i % 256 for i in range(31))] if bos else [i * i % 256 for i in range(32)]
        blocks = training_blocks(model, tokenizer, job, 32, 4, None, Accelerator(cpu=True))
        assert blocks.blocks[0].tolist() == expected
        scored = evaluation_tokens(model, tokenizer, job, show_progress=False)
        assert scored[:32].tolist() == expected
        firsts = scored.view(-1, 128)[:, 0].tolist()
        assert firsts == ([255] * len(firsts) if bos else [i * i % 256 for i in range(0, 128 * len(firsts), 128)])


def test_sequences_longer_than_the_models_positions_are_refused(word_model, capsys):  # noqa: F811
    arguments = [word_model / "model", word_model / "ckpt", "--data", word_model / "text.txt", *SMALL]
    assert run(*arguments, "--sequence-length", 257) == 2
    assert "--sequence-length 257 is more than the 256 positions" in capsys.readouterr().err
    assert run(*arguments, "--sequence-length", 256) == 0


def test_a_model_without_its_tokenizer_is_refused(word_model, capsys):  # noqa: F811
    for file in (word_model / "model").glob("tokenizer*"):
        file.unlink()  # Transformers makes an empty one
    assert run(word_model / "model", word_model / "ckpt", "--data", word_model / "text.txt", *SMALL) == 2
    assert "the tokenizer finds no tokens in" in capsys.readouterr().err


def test_tyr_needs_a_token_to_predict(word_model, capsys):  # noqa: F811
    arguments = [word_model / "model", word_model / "ckpt", "--data", word_model / "text.txt", "--method", "tyr"]
    assert run(*arguments, "--sequence-length", 1, "--calibration-sequences", 4) == 2
    assert "--sequence-length 1 leaves no token to predict" in capsys.readouterr().err
    assert [path.name for path in word_model.iterdir() if "ckpt" in path.name] == []


@pytest.mark.parametrize("seed", ["-1", str(2**32), "1.5"])
def test_seeds_are_what_every_generator_takes(seed, capsys):
    for command in (lambda: run("model", "ckpt", "--seed", seed), lambda: seeded_finetuning(seed)):
        with pytest.raises(SystemExit) as ended:
            command()
        assert ended.value.code == 2 and "is not a whole number from 0 to 4294967295" in capsys.readouterr().err


def seeded_finetuning(seed: str) -> int:
    return finetune_cli.main(["out", "recovered", "--data", "text.txt", "--seed", seed])


def test_other_ways_to_shard_are_refused(word_model, monkeypatch, capsys):  # noqa: F811
    class Sharded(Accelerator):
        distributed_type = DistributedType.DEEPSPEED

    monkeypatch.setattr(learn, "on_device", lambda device: Sharded(cpu=True))
    assert run(word_model / "model", word_model / "ckpt", "--method", "random") == 2
    assert "accelerate is set up for DEEPSPEED; learn-masks shards weights with FSDP" in capsys.readouterr().err


def test_a_perplexity_beyond_all_numbers_is_infinite():
    model = tiny_model("llama", 6, 6, 40)
    model.lm_head.weight.mul_(1e4)  # sure of what is wrong
    assert perplexity(model, torch.arange(256)) == math.inf
    model.lm_head.weight.fill_(math.nan)
    assert math.isnan(perplexity(model, torch.arange(256)))
