"""`make real` measures masked and converted models alike."""

from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
from helpers.learning import run
from transformers import AutoTokenizer

from bench.real import evaluation, plan
from converter.convert import convert
from converter.plan import make_plan
from pruned_vllm.common.errors import InputError


def test_text_is_measured_in_blocks_from_all_of_it(word_model):
    tokenizer = AutoTokenizer.from_pretrained(word_model / "model")
    text = word_model / "numbers.txt"
    text.write_text(" ".join(str(place // 128) for place in range(7 * 128 + 50)))  # every block has its number
    for count, expected in {3: [0, 3, 6], 7: list(range(7)), 100: list(range(7)), 1: [0]}.items():
        ids = evaluation.held_out(tokenizer, [text], count)
        assert ids.tolist() == [number for number in expected for _ in range(128)]
    text.write_text(" ".join("1" * 127))
    with pytest.raises(InputError, match="--eval-data has 127 tokens; perplexity needs 128"):
        evaluation.held_out(tokenizer, [text])


def test_every_block_begins_as_the_tokenizer_begins_a_text(word_model):
    tokenizer = AutoTokenizer.from_pretrained(word_model / "model", bos_token="255", add_bos_token=True)
    blocks = evaluation.held_out(tokenizer, [word_model / "text.txt"], 3).view(-1, 128)
    starts = (0, 11 * 127, 22 * 127)  # of 23 blocks, which have room for 127 tokens of text
    assert blocks.tolist() == [[255, *(i * i % 256 for i in range(start, start + 127))] for start in starts]


@pytest.mark.parametrize("has_template", [True, False])
def test_a_served_model_is_asked_in_a_chat_if_it_has_a_template(has_template, word_model, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(word_model / "model")
    tokenizer.chat_template = "{{ messages[0]['content'] }}" if has_template else None
    tokenizer.save_pretrained(word_model / "model")
    asked = []

    class Client:
        """Of the two ways to ask a server: `chat.completions`, and `completions`."""

        def __init__(self, chat):
            self.chat, self.completions = chat, SimpleNamespace(create=partial(self.answer, "text"))

        @staticmethod
        def answer(kind, **request):
            asked.append((kind, request))
            return SimpleNamespace(choices=[SimpleNamespace(text="on", message=SimpleNamespace(content="on"))])

    @contextmanager
    def served(directory, log, name):
        yield Client(SimpleNamespace(completions=SimpleNamespace(create=partial(Client.answer, "chat"))))

    monkeypatch.setattr(evaluation, "served", served)
    monkeypatch.setattr(evaluation, "served_perplexity", lambda client, name, ids: float(len(ids)))
    prompts = ("1 2", "3")
    found = evaluation.ask_served(
        word_model / "model", prompts, [word_model / "text.txt"], 3, word_model / "server.log"
    )
    assert found == {"perplexity": 3 * 128, "chat": [{"prompt": prompt, "answer": "on"} for prompt in prompts]}
    said = {"chat": {"messages": [{"role": "user", "content": "1 2"}]}, "text": {"prompt": "1 2"}}
    kind = "chat" if has_template else "text"
    assert asked[0] == (kind, {"model": "real", **said[kind], "max_tokens": plan.ANSWER_TOKENS, "temperature": 0})


SHORT = ("--steps", 2, "--batch-size", 2, "--sequence-length", 32)


@pytest.mark.parametrize(
    "options",
    [
        ("magnitude",),
        ("ddp", *SHORT, "--data"),
        ("maskprune", *SHORT, "--lora-learning-rate", 0.1, "--data"),
        ("tyr", "--calibration-sequences", 4, "--sequence-length", 32, "--iterations", 0, "--data"),
    ],
    ids=lambda options: options[0],
)
def test_a_converted_model_has_the_perplexity_of_the_masked_one(word_model, options):
    """Also where masks are no zeros and ones, an adapter was trained, or the checkpoint has weights of its own."""
    model, text, ckpt, out = (word_model / name for name in ("model", "text.txt", "ckpt", "out"))
    data = [text] if options[-1] == "--data" else []
    assert run(model, ckpt, "--device", "cpu", "--method", *options, *data) == 0
    convert(make_plan(ckpt), out)
    known = evaluation.knowledge(out, [text], 9)
    masked = evaluation.masked_perplexity(ckpt, [text], 9)
    assert masked == pytest.approx(known["perplexity"], rel=1e-5)
    assert abs(masked / evaluation.knowledge(model, [text], 9)["perplexity"] - 1) > 1e-3, "pruning did nothing"
