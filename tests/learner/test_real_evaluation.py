"""`make real` measures masked and converted models alike."""

import pytest
from helpers.learning import run

from bench.real import evaluation
from converter.convert import convert
from converter.plan import make_plan

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
    assert known["tokens"] == len(text.read_text().split())
