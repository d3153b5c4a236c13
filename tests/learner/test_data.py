"""Text sources: what is read, in which order, and what is refused. There is no network: the hub's layout is local."""

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from learner.data import reading as data
from learner.data.reading import BlockSampler, beginning, blocks_of_text, read_tokens, tokenize_files
from pruned_vllm.common.errors import InputError

EOS = 999


@pytest.fixture(scope="module")
def tokenizer():
    """Knows the numbers below 999, which it encodes as themselves."""
    words = {str(number): number for number in range(EOS)} | {"<eos>": EOS}
    words = Tokenizer(models.WordLevel(words, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")


@pytest.fixture
def files(tmp_path):
    """Documents of two tokens: 100 100, 101 101, ... in a.jsonl and so on."""

    def rows(start: int) -> list[dict]:
        return [{"id": number, "text": f"{number} {number}"} for number in range(start, start + 20)]

    (tmp_path / "a.txt").write_text("1 2 3")
    (tmp_path / "b.txt").write_text("4 5")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(100)))
    (tmp_path / "array.json").write_text(json.dumps([{"text": row["text"]} for row in rows(200)]))
    pq.write_table(pa.Table.from_pylist(rows(300)), tmp_path / "rows[1].parquet")  # a name that is a pattern, too
    (tmp_path / "hub").mkdir()
    for index, (split, start) in enumerate([("train", 400), ("train", 420), ("validation", 440)]):
        lines = "".join(json.dumps(row) + "\n" for row in rows(start))
        (tmp_path / "hub" / f"{split}-{index}.jsonl").write_text(lines)
    return tmp_path


def documents(ids: torch.Tensor) -> list[list[int]]:
    """The documents between end-of-text tokens."""
    found = [[]]
    for token in ids.tolist():
        if token == EOS:
            found.append([])
        else:
            found[-1].append(token)
    return found


def test_text_files_come_whole_and_in_order(tokenizer, files):
    texts = [files / "b.txt", files / "a.txt"]
    ids = read_tokens(tokenizer, texts, seed=0)
    assert ids.tolist() == [4, 5, EOS, 1, 2, 3] and ids.dtype == torch.int64
    assert tokenize_files(tokenizer, texts).tolist() == [4, 5, EOS, 1, 2, 3]


def test_a_long_document_is_tokenized_in_pieces_and_no_further_than_needed(tokenizer, tmp_path, monkeypatch):
    lines = [f"{number} {number}" for number in range(100, 200)]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    (tmp_path / "line.txt").write_text(" ".join(lines))
    texts = [tmp_path / "lines.txt", tmp_path / "line.txt"]
    monkeypatch.setattr(data, "CHARACTERS_AT_ONCE", 20)
    whole = read_tokens(tokenizer, texts, seed=0)
    monkeypatch.setattr(data, "LONGEST_PIECE", 62)  # cut behind line breaks: 7 lines of 8 characters
    pieces, _batches = [], data._batches

    def watched(stream):
        for batch in _batches(stream):
            pieces.extend(text for text, _ in batch)
            yield batch

    monkeypatch.setattr(data, "_batches", watched)
    assert torch.equal(read_tokens(tokenizer, texts[:1], seed=0), whole[:200])
    assert max(map(len, pieces)) == 56 and "".join(pieces) == texts[0].read_text()
    pieces.clear()
    assert len(read_tokens(tokenizer, texts, seed=0)) == len(whole) + 6, "every other cut parts a number"
    pieces.clear()
    assert torch.equal(read_tokens(tokenizer, texts, limit=20, seed=0), whole[:20])
    assert len(pieces) == 2, "the rest is not tokenized"


def test_documents_are_parted_alike_in_small_and_large_batches(tokenizer, files, monkeypatch):
    ids = read_tokens(tokenizer, [files / "rows.jsonl"], seed=0)
    monkeypatch.setattr(data, "CHARACTERS_AT_ONCE", 20)
    assert torch.equal(ids, read_tokens(tokenizer, [files / "rows.jsonl"], seed=0))


@pytest.mark.parametrize(("name", "start"), [("rows.jsonl", 100), ("array.json", 200), ("rows[1].parquet", 300)])
def test_rows_are_documents_in_an_order_by_the_seed(tokenizer, files, name, start):
    ids = read_tokens(tokenizer, [files / name], seed=1)
    found, expected = documents(ids), [[number, number] for number in range(start, start + 20)]
    assert sorted(found) == expected and found != expected
    assert torch.equal(ids, read_tokens(tokenizer, [files / name], seed=1))
    assert not torch.equal(ids, read_tokens(tokenizer, [files / name], seed=2))


def test_a_data_set_has_splits(tokenizer, files):
    train, validation = (
        read_tokens(tokenizer, [files / "hub"], split=split, seed=0) for split in ("train", "validation")
    )
    assert sorted(documents(train)) == [[number, number] for number in range(400, 440)]
    assert sorted(documents(validation)) == [[number, number] for number in range(440, 460)]


def test_an_id_is_streamed_with_its_configuration(tokenizer, files, monkeypatch):
    """`datasets` gets the id, and what it finds there is here the local directory."""
    import datasets

    asked, load_dataset = [], datasets.load_dataset

    def load_local(*args, **kwargs):
        asked.append((args, kwargs))
        return load_dataset(str(files / "hub"), split=kwargs["split"], streaming=kwargs["streaming"])

    monkeypatch.setattr(datasets, "load_dataset", load_local)
    ids = read_tokens(tokenizer, ["owner/name:part"], split="validation", limit=30, seed=0)
    assert asked == [(("owner/name", "part"), {"split": "validation", "streaming": True})]
    assert len(ids) == 30 and 440 <= ids[0] < 460
    read_tokens(tokenizer, [Path("owner/name")], limit=3, seed=0)
    assert asked[1][0] == ("owner/name", None)


def test_the_limit_is_shared_by_the_sources(tokenizer, files):
    sources = [files / name for name in ("a.txt", "b.txt", "rows.jsonl", "array.json", "hub")]
    ids = read_tokens(tokenizer, sources, limit=40, seed=3)
    assert len(ids) == 40
    found = documents(ids)
    assert found[0] == [1, 2, 3] and found[3] == [4, 5]  # a text file, a row of a file, a row of a data set
    hundreds = {document[0] // 100 for document in found[:-1]}
    assert 4 in hundreds and hundreds & {1, 2}


def test_no_more_is_read_than_the_limit_asks_for(tokenizer, files, monkeypatch):
    monkeypatch.setattr(data, "CHARACTERS_AT_ONCE", 1)
    read = []
    monkeypatch.setattr(data, "_read_text", lambda path: read.append(path.name) or "7 8 9")
    texts = [files / "a.txt", files / "b.txt"]
    assert read_tokens(tokenizer, texts, limit=2, seed=0).tolist() == [7, 8]
    assert read == ["a.txt", "b.txt", "a.txt"], "both are checked, one is read"


def test_rows_without_text_are_left_out(tokenizer, tmp_path):
    (tmp_path / "some.jsonl").write_text('{"text": null}\n{"text": ""}\n{"text": "5"}\n')
    assert read_tokens(tokenizer, [tmp_path / "some.jsonl"], seed=0).tolist() == [5]
    (tmp_path / "none.jsonl").write_text('{"text": null}\n{"text": ""}\n')
    with pytest.raises(InputError, match="there is no text in .*none.jsonl"):
        read_tokens(tokenizer, [tmp_path / "none.jsonl"], seed=0)


def test_all_problems_are_told_at_once(tokenizer, files):
    (files / "latin.txt").write_bytes("caf\u00e9 1".encode("latin1"))
    (files / "latin.jsonl").write_bytes('{"text": "caf\u00e9"}\n'.encode("latin1"))
    (files / "broken.json").write_text("[1, ")
    (files / "broken.parquet").write_text("no parquet")
    (files / "empty.txt").touch()
    (files / "empty.jsonl").touch()
    (files / "other.jsonl").write_text('{"body": "1", "title": "2"}\n')
    (files / "numbers.jsonl").write_text('{"text": 1}\n')
    (files / "lines").mkdir()
    (files / "lines" / "a.txt").write_text("1\n2\n")
    names = ("latin.txt", "latin.jsonl", "broken.json", "broken.parquet", "empty.txt", "empty.jsonl", "other.jsonl")
    sources = [files / name for name in (*names, "numbers.jsonl", "lines", "missing.txt", "a.txt")]
    with pytest.raises(InputError) as caught:
        read_tokens(tokenizer, [*sources, "missing", "owner/name", "here/missing.jsonl"], seed=0)
    expected = [
        ("latin.txt", "can't decode byte 0xe9"),
        ("latin.jsonl", "can't decode byte 0xe9"),
        ("broken.json", "cannot be read"),
        ("broken.parquet", "cannot be read"),
        ("empty.txt", "the file is empty"),
        ("empty.jsonl", "the file is empty"),
        ("other.jsonl", "there is no column 'text'; it has 'body', 'title'"),
        ("numbers.jsonl", "column 'text' holds int, not text"),
        ("lines", "would be read line by line; name its files"),
        ("missing.txt", "no such file"),
        ("missing", "no such file"),
        ("owner/name", "Couldn't reach 'owner/name' on the Hub"),  # tests are offline
        ("here/missing.jsonl", "no such file"),
    ]
    assert len(caught.value.problems) == len(expected), caught.value
    for problem, (name, message) in zip(caught.value.problems, expected, strict=True):
        assert name in problem.partition(": ")[0] and message in problem


def test_an_unknown_split_names_the_known(tokenizer, files):
    with pytest.raises(InputError, match="Available splits: .*train.*validation"):
        read_tokens(tokenizer, [files / "hub"], split="test", seed=0)


def test_rows_that_break_off_are_an_input_error(tokenizer, tmp_path):
    lines = [json.dumps({"text": "1 " * 1000}) for _ in range(20_000)]  # the first chunk, which is checked, is sound
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines, '{"text": ']))
    with pytest.raises(InputError, match="rows.jsonl: cannot be read to its end"):
        read_tokens(tokenizer, [tmp_path / "rows.jsonl"], seed=0)


def test_rows_need_the_datasets_library_and_text_files_do_not(tokenizer, files, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert len(read_tokens(tokenizer, [files / "a.txt"], seed=0)) == 3
    with pytest.raises(InputError, match=r"rows.jsonl: .*pip install 'pruned-vllm\[data\]'"):
        read_tokens(tokenizer, [files / "rows.jsonl"], seed=0)


@pytest.mark.parametrize("adds_bos", [True, False])
def test_blocks_begin_as_the_tokenizer_begins_a_text(adds_bos, tokenizer):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        **{"bos_token": "1", "eos_token": "<eos>", "add_bos_token": adds_bos},
    )
    first = [1] if adds_bos else []
    assert beginning(tokenizer) == first
    blocks = blocks_of_text(torch.arange(100, 111), 4, beginning(tokenizer))
    if adds_bos:
        assert blocks.tolist() == [[1, 100, 101, 102], [1, 103, 104, 105], [1, 106, 107, 108]]
    else:
        assert blocks.tolist() == [[100, 101, 102, 103], [104, 105, 106, 107]]
    sampler = BlockSampler(torch.arange(100, 111), 4, seed=0, first=first)
    assert sorted(sampler.next_batch(len(blocks)).tolist()) == blocks.tolist()


def test_a_block_without_room_for_text_is_refused():
    with pytest.raises(InputError, match="--sequence-length 1 has no room behind the token that begins every text"):
        BlockSampler(torch.arange(5), 1, seed=0, first=[1])
