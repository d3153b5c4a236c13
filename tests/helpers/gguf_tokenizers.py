"""Small tokenizers of the kinds that a GGUF file can hold, trained on the spot."""

from collections.abc import Callable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXT = ["the quick brown fox jumps over the lazy dog 12345 times, doesn't it?", "a thousand words", "öäü, 你好"] * 4
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(*before, use_regex: bool) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, last]) if before else last
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|end|>"]
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.add_tokens(["[user]"])
    return fast


def split(digits: str):
    return pre_tokenizers.Split(Regex(SPLIT % digits), behavior="isolated")


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "gpt-2": lambda: byte_level(use_regex=True),
    "smollm": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True), use_regex=True),
    "llama-bpe": lambda: byte_level(split("{1,3}"), use_regex=False),
    "qwen2": lambda: byte_level(split(""), use_regex=False),
}


def sentencepiece_model(directory: Path, **options):
    """Writes tokenizer.model, byte-pair encoding with bytes for what it does not know; returns its processor."""
    import sentencepiece

    (directory / "text.txt").write_text("\n".join(TEXT))
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "text.txt"),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        character_coverage=1.0,
        hard_vocab_limit=False,
        minloglevel=2,
        **{"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False} | options,
    )
    (directory / "tokenizer.vocab").unlink()
    (directory / "text.txt").unlink()
    return sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
