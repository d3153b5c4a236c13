"""`make real` measures masked and converted models alike."""

import pytest
from helpers.learning import run
from transformers import AutoTokenizer

from bench.real import evaluation, plan
from converter.convert import convert
from converter.plan import make_plan
from pruned_vllm.common.errors import InputError


def test_text_is_measured_in_blocks_from_all_of_it(word_model, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(word_model / "model")
    text = word_model / "numbers.txt"
    text.write_text(" ".join(str(place // 128) for place in range(7 * 128 + 50)))  # every block has its number
    for count, expected in {3: [0, 3, 6], 7: list(range(7)), 100: list(range(7)), 1: [0]}.items():
        monkeypatch.setattr(plan, "EVAL_BLOCKS", count)
        ids = evaluation.held_out(tokenizer, [text])
        assert ids.tolist() == [number for number in expected for _ in range(128)]
    text.write_text(" ".join("1" * 127))
    with pytest.raises(InputError, match="--eval-data has 127 tokens; perplexity needs 128"):
        evaluation.held_out(tokenizer, [text])


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
    known = evaluation.knowledge(out, [text])
    masked = evaluation.masked_perplexity(ckpt, [text])
    assert masked == pytest.approx(known["perplexity"], rel=1e-5)
    assert abs(masked / evaluation.knowledge(model, [text])["perplexity"] - 1) > 1e-3, "pruning did nothing"
