"""What InputError makes of sentences that quote too much."""

from pruned_vllm.common.errors import LONGEST, InputError


def test_sentences_are_no_longer_than_someone_reads():
    usual, long = "x" * LONGEST, "begin" + "y" * 2**20 + "end"
    error = InputError(long, [usual, long])
    what, first, second = str(error).split("\n  - ")
    assert error.problems == (first, second)
    assert first == usual
    for sentence in (what, second):
        assert sentence.startswith("beginyyy") and sentence.endswith("yyyend")
        assert f"[... {len(long) - LONGEST:,} characters ...]" in sentence
        assert len(sentence) < LONGEST + 100
