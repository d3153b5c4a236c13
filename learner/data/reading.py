"""Text to batches of token blocks: text files, JSONL, parquet, or a data set of the Hugging Face hub.

    ids = read_tokens(tokenizer, ["a.txt", "c4.jsonl", "HuggingFaceFW/fineweb-edu:sample-10BT"], limit=10**7, seed=42)
    blocks = BlockSampler(ids, sequence_length=2048, seed=42)

A source is
- a file *.jsonl, *.json or *.parquet: one document in each row
- any other file: UTF-8 text, one document
- "owner/name" or "owner/name:configuration" of a data set on the hub, or a directory in the hub's layout

Rows and data sets are read as a stream with the `datasets` library and shuffled; of the hub's data sets only what is
read is downloaded. Reading stops at `limit` tokens.

Memory: 8 bytes for each token, SHUFFLE_BUFFER documents of each source, and the text of one text file. A text file is
one document however large it is; it is tokenized in pieces of LONGEST_PIECE characters.
"""

import glob
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from pruned_vllm.common.errors import InputError
from pruned_vllm.common.progress import progress_bar

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}  # what `datasets` calls them
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
SHUFFLE_BUFFER = 10_000  # documents
SHARDS_AT_ONCE = 10  # files of a data set that the buffer is filled from
CHARACTERS_AT_ONCE = 1 << 20  # a call of the tokenizer gets documents until they have so many
LONGEST_PIECE = 1 << 23  # characters of a document that are tokenized at once: that takes many times their memory


def tokenize_files(tokenizer: PreTrainedTokenizerBase, files: list[Path]) -> torch.Tensor:
    """Token ids [N] of files, all of them and in their order; see `read_tokens`."""
    return read_tokens(tokenizer, files, seed=0, show_progress=False)


def read_tokens(
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str | Path],
    *,
    limit: int | None = None,
    column: str = "text",
    split: str = "train",
    seed: int,
    show_progress: bool = True,
) -> torch.Tensor:
    """Token ids int64 [N] of documents from `sources`, an end-of-text token between them; the same for the same seed.

    Text files keep their order. Text files, other files and each data set give a document in turn, so that all have a
    share in the limit.

    Args:
        sources: see the top of this file.
        limit: N at most; None reads everything.
        column: where rows have their text; rows without text are left out.
        split: of data sets; files have none.
        seed: of the order of rows.
        show_progress: on stderr.

    Raises:
        InputError: with every source that cannot be used; or rows further on cannot be read.
    """
    documents = _in_turn(_open(sources, column, split, seed))
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    found: list[torch.Tensor] = []
    count, has_tokens = 0, False
    # Without a total: nobody knows how many tokens the text has before it ends.
    with progress_bar(desc="reading text", unit=" tokens", unit_scale=True, disable=not show_progress) as progress:
        for pieces in _batches(chain.from_iterable(map(_pieces, documents))):
            texts, begins_document = zip(*pieces, strict=True)
            tokenized = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
            has_tokens = has_tokens or any(tokenized)
            parted = zip(tokenized, begins_document, strict=True)
            ids = list(chain.from_iterable((separator if begins else []) + piece for piece, begins in parted))
            if not found:
                ids = ids[len(separator) :]
            found.append(torch.tensor(ids[: None if limit is None else limit - count], dtype=torch.int64))
            count += len(found[-1])
            progress.update(len(found[-1]))
            if count == limit:
                break
    where = ", ".join(map(str, sources)) or "an empty list of sources"
    if not found:
        raise InputError(f"there is no text in {where}")
    if not has_tokens:
        raise InputError(f"the tokenizer finds no tokens in {where}; are its files in the model's directory?")
    return torch.cat(found)


def _open(sources: Sequence[str | Path], column: str, split: str, seed: int) -> list[Iterator[str]]:
    """Streams of documents: of all text files, of all other files, and of each data set."""
    texts, files, data_sets, problems = [], [], [], []
    for source in map(str, sources):
        path = Path(source)
        try:
            if path.is_file() and path.suffix in FORMATS:
                files.append(_rows(source, column, "train", seed))
            elif path.is_file():
                _read_text(path)  # only to check it; it is read again when its turn comes
                texts.append(path)
            elif path.is_dir() or (HUB_ID.fullmatch(source) and path.suffix not in {".txt", *FORMATS}):
                data_sets.append(_rows(source, column, split, seed))
            else:
                raise InputError(f"{source}: no such file, and no name of a data set on the hub (owner/name)")
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("These sources of text cannot be used:", problems)
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed)).tolist()
    return [map(_read_text, texts), chain.from_iterable(files[index] for index in order), *data_sets]


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {error}") from error
    if not text:
        raise InputError(f"{path}: the file is empty")
    return text


def _rows(source: str, column: str, split: str, seed: int) -> Iterator[str]:
    """The texts of a file or data set, shuffled; InputError if the first row has none."""
    try:
        from datasets import load_dataset  # late: text files do not need it
    except ImportError as error:
        raise InputError(
            f"{source}: this needs the `datasets` library: pip install 'pruned-vllm[data]', or give text files"
        ) from error
    path, name, configuration = Path(source), source, None
    if path.is_file() and not path.stat().st_size:
        raise InputError(f"{source}: the file is empty")
    if not path.exists():
        name, _, configuration = source.partition(":")
    try:
        if path.is_file():
            rows = load_dataset(FORMATS[path.suffix], data_files=[glob.escape(source)], split=split, streaming=True)
        else:
            rows = load_dataset(name, configuration or None, split=split, streaming=True)
        first = next(iter(rows), None)
    except Exception as error:  # damaged files, unknown names and networks raise many kinds
        raise InputError(f"{source}: cannot be read: {type(error).__name__}: {error}") from error
    if path.is_dir() and rows.info.builder_name == "text":
        raise InputError(f"{source}: a directory of text files would be read line by line; name its files instead")
    if first is None:
        raise InputError(f"{source}: there are no rows")
    if column not in first:
        raise InputError(f"{source}: there is no column {column!r}; it has {', '.join(map(repr, first))}")
    if not isinstance(first[column], str | None):
        raise InputError(f"{source}: column {column!r} holds {type(first[column]).__name__}, not text")
    shards_at_once = 1 if path.is_file() else SHARDS_AT_ONCE
    rows = rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER, max_buffer_input_shards=shards_at_once)
    return _documents(rows, source, column)


def _documents(rows: Iterable[dict], source: str, column: str) -> Iterator[str]:
    rows = iter(rows)
    while True:
        try:
            row = next(rows, None)
        except Exception as error:
            raise InputError(f"{source}: cannot be read to its end: {type(error).__name__}: {error}") from error
        if row is None:
            return
        text = row.get(column)
        if not isinstance(text, str | None):
            raise InputError(f"{source}: column {column!r} holds {type(text).__name__} in some rows, not text")
        if text:
            yield text


def _in_turn(streams: list[Iterator[str]]) -> Iterator[str]:
    """One item of each stream in turn, until all have ended."""
    while streams:
        going_on = []
        for stream in streams:
            for item in islice(stream, 1):
                going_on.append(stream)
                yield item
        streams = going_on


def _pieces(document: str) -> Iterator[tuple[str, bool]]:
    """A document in pieces of at most LONGEST_PIECE, cut behind line breaks if it has them; True for its first."""
    start = 0
    while start < len(document):
        end = start + LONGEST_PIECE
        if end < len(document):
            end = document.rfind("\n", start, end) + 1 or end
        yield document[start:end], start == 0
        start = end


def _batches(pieces: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    batch, characters = [], 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece[0])
        if characters >= CHARACTERS_AT_ONCE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer begins every text with, so that a model is asked so when it is served: [<bos>] or nothing."""
    first = tokenizer("")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def blocks_of_text(token_ids: torch.Tensor, block_size: int, first: Sequence[int] = ()) -> torch.Tensor:
    """Token ids [N] as blocks [M, block_size] that all begin with `first`; the remainder is dropped.

    `first` is the tokenizer's `beginning`, without which models such as Gemma predict next to nothing. Raises
    InputError where it leaves no room for text.
    """
    begin = torch.tensor(first, dtype=token_ids.dtype)
    text_size = block_size - len(begin)
    if text_size < 1:
        raise InputError(f"--sequence-length {block_size} has no room behind the token that begins every text")
    count = len(token_ids) // text_size
    return torch.cat([begin.expand(count, -1), token_ids[: count * text_size].view(count, text_size)], dim=1)


class BlockSampler:
    """Cuts token ids into blocks [sequence_length], see `blocks_of_text`, and deals them in random order.

    Each block is dealt once before any is dealt again; the order depends on the seed alone.
    """

    def __init__(self, token_ids: torch.Tensor, sequence_length: int, seed: int, first: Sequence[int] = ()):
        self.blocks = blocks_of_text(token_ids, sequence_length, first)
        if not len(self.blocks):
            raise InputError(
                f"The text has {len(token_ids)} tokens, fewer than one block of {sequence_length}; "
                "give more text (--data) or shorter blocks (--sequence-length)"
            )
        self.sequence_length = sequence_length
        self._generator = torch.Generator().manual_seed(seed)
        self._order = torch.empty(0, dtype=torch.long)

    def next_batch(self, batch_size: int) -> torch.Tensor:
        """Token ids [batch_size, sequence_length]."""
        while len(self._order) < batch_size:
            self._order = torch.cat([self._order, torch.randperm(len(self.blocks), generator=self._generator)])
        batch, self._order = self._order[:batch_size], self._order[batch_size:]
        return self.blocks[batch]

    def digest(self) -> str:
        """Of all blocks: the same for the same text, tokenizer, order and sequence length."""
        return hashlib.sha256(self.blocks.numpy().data).hexdigest()

    def calibration(self, count: int, tell: Callable[[str], None]) -> torch.Tensor:
        """Token ids [count, sequence_length] of different blocks; fewer, and a word to `tell`, if that is all."""
        available, length = self.blocks.shape
        if available < count:
            tell(f"--data has {available} sequences of {length} tokens, fewer than --calibration-sequences {count}.")
        return self.next_batch(min(count, available))
