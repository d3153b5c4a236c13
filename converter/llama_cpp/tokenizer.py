"""The tokenizer in a GGUF file's metadata.

llama.cpp has tokenizers of its own, told by two names: the algorithm ("llama" is SentencePiece's, "gpt2" byte-level
BPE), and for the latter how text is cut into words. A tokenizer that it would not compute alike is refused. A file
without one takes and gives ids of tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf

from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import read_json
from pruned_vllm.formats.companions import has_tokenizer
from pruned_vllm.formats.config_values import shown

NONE = "none"
SENTENCEPIECE_FILE, TOKENIZER_FILE = "tokenizer.model", "tokenizer.json"
WITHOUT = "--without-tokenizer writes a file that takes ids of tokens"
SPACE = "\u2581"  # how SentencePiece writes a space
PROBE = "a  b\t\n c \uff21 \ufb01 \u2460 "  # what normalisations change

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# llama.cpp's name for the expression by which text is cut before byte-level BPE (src/llama-vocab.cpp).
EXPRESSIONS = {_WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe", _WORDS + r"\p{N}" + _REST: "qwen2"}


@dataclass(frozen=True)
class Vocabulary:
    """What llama.cpp needs of a tokenizer.

    Attributes:
        model, pre: the names of the algorithm and of how text is cut.
        tokens, types: of every id.
        scores: of every id, for SentencePiece.
        space_prefix: whether text gets a space in front, for SentencePiece.
    """

    model: str
    pre: str
    tokens: list[str | bytes]
    types: list[int]
    scores: list[float] | None = None
    space_prefix: bool | None = None

    def padded(self, size: int) -> "Vocabulary":
        """With tokens that mean nothing up to the rows of the embedding. Raises InputError where there are more."""
        missing = size - len(self.tokens)
        if missing < 0:
            raise InputError(f"the tokenizer has {len(self.tokens):,} tokens, the model {size:,}; {WITHOUT}")
        names = [f"[PAD{index}]" for index in range(len(self.tokens), size)]
        unused = [int(gguf.TokenType.UNUSED)] * missing
        scores = None if self.scores is None else [*self.scores, *[0.0] * missing]
        return replace(self, tokens=[*self.tokens, *names], types=[*self.types, *unused], scores=scores)


def add_tokenizer(writer: gguf.GGUFWriter, directory: Path, vocab_size: int, *, without: bool) -> None:
    """Adds the tokenizer in a model directory to a file; none where there is none, or `without` says so.

    Raises:
        InputError: llama.cpp would compute other tokens.
    """
    if without or not has_tokenizer(directory):
        writer.add_tokenizer_model(NONE)
        return
    vocabulary = read_vocabulary(directory).padded(vocab_size)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    special = gguf.SpecialVocab(directory, load_merges=vocabulary.model == "gpt2", n_vocab=vocab_size)
    special.add_to_gguf(writer, quiet=True)
    if vocabulary.space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.space_prefix)


def read_vocabulary(directory: Path) -> Vocabulary:
    """Reads the tokenizer of a model directory. Raises InputError for one that is damaged or that llama.cpp has not."""
    try:
        if (directory / SENTENCEPIECE_FILE).is_file():
            return _sentencepiece(directory)
        if (directory / TOKENIZER_FILE).is_file():
            return _byte_level(directory)
    except InputError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:  # JSON of other kinds than is there
        raise InputError(
            f"The tokenizer in {directory} is damaged ({type(error).__name__}: {str(error)[:200]}); {WITHOUT}"
        ) from None
    raise InputError(
        f"{directory} has a tokenizer, but neither {SENTENCEPIECE_FILE} nor {TOKENIZER_FILE}, the two that can be "
        f"exported; {WITHOUT}"
    )


def _sentencepiece(directory: Path) -> Vocabulary:
    try:
        vocabulary = gguf.SentencePieceVocab(directory)
    except (RuntimeError, ValueError, OSError) as error:  # not installed, or damaged
        raise InputError(f"{directory / SENTENCEPIECE_FILE} cannot be read: {error}") from None
    processor = vocabulary.sentencepiece_tokenizer
    if processor.decode(processor.encode(PROBE)) != PROBE:
        raise InputError(
            f"{directory / SENTENCEPIECE_FILE} changes text before it cuts it (normalisation, or no bytes for what it "
            f"does not know), which llama.cpp does not; {WITHOUT}"
        )
    pieces = list(vocabulary.all_tokens())
    tokens: list[str | bytes] = [text for text, _, _ in pieces]
    scores, types = [score for _, score, _ in pieces], [int(kind) for _, _, kind in pieces]
    for index, token in sorted(_added_tokens(directory).items()):
        if index > len(tokens):
            raise InputError(f"{directory}: there are no tokens between {len(tokens) - 1} and {index}; {WITHOUT}")
        if index == len(tokens):
            tokens, scores, types = [*tokens, token["content"]], [*scores, -1000.0], [*types, 0]
        if index >= vocabulary.vocab_size_base or token.get("special"):
            types[index] = _added_type(token)
    prefix = _settings(directory).get("add_prefix_space")
    if not isinstance(prefix, bool):
        prefix = processor.id_to_piece(processor.encode("a")[0]).startswith(SPACE)
    return Vocabulary("llama", "default", tokens, types, scores, prefix)


def _byte_level(directory: Path) -> Vocabulary:
    tokenizer = read_json(directory / TOKENIZER_FILE)
    model = tokenizer.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        kind = model.get("type") if isinstance(model, dict) else None
        raise InputError(
            f"{directory / TOKENIZER_FILE} is {shown(kind)}; byte-level BPE can be exported, or SentencePiece with its "
            f"{SENTENCEPIECE_FILE}; {WITHOUT}"
        )
    pre = _pre_tokenizer(directory, tokenizer)
    if not model.get("merges"):
        raise InputError(f"{directory / TOKENIZER_FILE} has no merges, which llama.cpp demands; {WITHOUT}")
    added = _added_tokens(directory)
    by_index = {index: token for token, index in model["vocab"].items()}
    by_index |= {index: token["content"] for index, token in added.items()}
    if sorted(by_index) != list(range(len(by_index))):
        raise InputError(f"{directory / TOKENIZER_FILE}: the ids of its tokens have gaps; {WITHOUT}")
    types = [
        _added_type(added[index]) if index in added else int(gguf.TokenType.NORMAL) for index in range(len(by_index))
    ]
    return Vocabulary("gpt2", pre, [by_index[index] for index in range(len(by_index))], types)


def _pre_tokenizer(directory: Path, tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer cuts text into words."""
    pre = tokenizer.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers") if pre.get("type") == "Sequence" else [pre]
    *before, last = steps or [{}]
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        by_words, kinds = last.get("use_regex", True), [step.get("type") for step in before]
        if by_words and not before:
            return "gpt-2"
        if by_words and kinds == ["Digits"] and before[0].get("individual_digits"):
            return "smollm"
        if not by_words and kinds == ["Split"] and before[0].get("behavior") == "Isolated":
            expression = (before[0].get("pattern") or {}).get("Regex")
            if not before[0].get("invert") and expression in EXPRESSIONS:
                return EXPRESSIONS[expression]
    raise InputError(
        f"{directory / TOKENIZER_FILE} cuts text into words in a way that has no name here: {str(pre)[:300]}. Known: "
        f"GPT-2's, SmolLM's, Llama 3's, Qwen2's, and SentencePiece with its {SENTENCEPIECE_FILE}; {WITHOUT}"
    )


def _settings(directory: Path) -> dict[str, Any]:
    path = directory / "tokenizer_config.json"
    return read_json(path) if path.is_file() else {}


def _added_tokens(directory: Path) -> dict[int, dict[str, Any]]:
    """Tokens that were added to the vocabulary or are special, by id: {"content": str, "special": bool}."""
    listed = _settings(directory).get("added_tokens_decoder")
    found = {int(index): token for index, token in listed.items()} if isinstance(listed, dict) else {}
    path = directory / TOKENIZER_FILE
    for token in (read_json(path).get("added_tokens") or ()) if path.is_file() else ():
        found[token["id"]] = token
    return found


def _added_type(token: Mapping[str, Any]) -> int:
    return int(gguf.TokenType.CONTROL if token.get("special") else gguf.TokenType.USER_DEFINED)
