"""Files of torch.save that are damaged, lie or are larger than the memory: refused, or read as far as they are true."""

import os
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from helpers.pickled import (
    NONE,
    STOP,
    archive,
    call,
    legacy,
    listed,
    mapping,
    name,
    number,
    sequence,
    sizes,
    storage,
    text,
)
from helpers.pickled import tensor as described
from helpers.torch_files import FLOATS, FORMATS, same_bits, saved
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converter import torch_files
from converter.pickles import attributes
from converter.torch_files import is_torch_file, module_tensors, read_torch_file, texts_at_start
from pruned_vllm.common.errors import InputError


def patch_entry(path, entry: str, place: int, value: bytes) -> None:
    """Overwrites a field of a file's entry in the directory of an archive."""
    raw = bytearray(path.read_bytes())
    at = raw.rindex(f"archive/{entry}".encode()) - 46
    assert raw[at : at + 4] == b"PK\x01\x02"
    raw[at + place : at + place + len(value)] = value
    path.write_bytes(raw)


def patched(entry: str, place: int, value: bytes):
    def make(path):
        patch_entry(archive(path, described() + STOP, {"0": bytes(16), "1": bytes(16)}), entry, place, value)

    return make


def zipped(**entries):
    """An archive of entries under their full names."""

    def make(path, kind=zipfile.ZIP_STORED):
        with zipfile.ZipFile(path, "w", kind) as file:
            for entry, content in entries.items():
                file.writestr(entry.replace("__", "/"), content)

    return make


def twice(path) -> None:
    with zipfile.ZipFile(archive(path, NONE + STOP), "a") as file, pytest.warns(UserWarning):
        file.writestr("archive/data.pkl", described() + STOP)


def truncated(size: int, container: str):
    def make(path):
        saved(path, {"a": torch.zeros(100)}, container)
        path.write_bytes(path.read_bytes()[:size])

    return make


def lying(claimed: int, raw: bytes, count: int = 4, key: str = "0"):
    """A legacy file whose storage claims a number of elements in its header."""
    return lambda path: legacy(path, described(storage(count=number(count))) + STOP, {key: (claimed, raw)})


def in_archive(program: bytes, **entries: bytes):
    return lambda path: archive(path, program + STOP, {"0": bytes(16)}, **entries)


VIEW = sequence(text("storage"), name("torch", "FloatStorage"), text("0"), text("cpu"), number(4), text("v")) + b"Q"
BIG = struct.pack("<I", 1 << 31)
DTYPE = call(name("numpy", "dtype"), text("f4"))


def array(state: bytes) -> bytes:
    return call(name("numpy._core.multiarray", "_reconstruct"), NONE) + state + b"b"


V3 = name("torch._utils", "_rebuild_tensor_v3")
REFUSED = {
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "a directory": (lambda path: path.mkdir(), "is no file"),
    "missing": (lambda path: None, "is missing"),
    "text": (lambda path: path.write_text("hello"), "damaged or no pickle"),
    "a plain pickle": (lambda path: path.write_bytes(b"\x80\x02}."), "torch.save did not write it"),
    "another number": (lambda path: path.write_bytes(DTYPE + STOP), "torch.save did not write it"),
    "another zip": (zipped(a="b"), "it has no data.pkl"),
    "data.pkl at the top": (zipped(**{"data.pkl": "N."}), "it has no data.pkl"),
    "compressed": (lambda path: zipped(a__b="b" * 99)(path, zipfile.ZIP_DEFLATED), "is compressed or encrypted"),
    "compression by name": (patched("data/0", 10, b"\x08\0"), "'archive/data/0' is compressed or encrypted"),
    "encrypted": (patched("data.pkl", 8, b"\x01\0"), "'archive/data.pkl' is compressed or encrypted"),
    "twice": (twice, "'archive/data.pkl' is there twice"),
    "two directories": (zipped(a__b="", c__d=""), "'c/d' is there twice, or not where torch.save puts it"),
    "the same place": (lambda path: same_place(path), "shares bytes with another file"),
    "offset outside": (patched("data/0", 42, BIG), "is not where the archive says"),
    "offset elsewhere": (patched("data/0", 42, b"\x05\0\0\0"), "is not where the archive says"),
    "size outside": (patched("data/0", 20, BIG + BIG), "is not where the archive says"),
    "two sizes": (patched("data/0", 24, b"\x08\0\0\0"), "is not where the archive says"),
    "huge version": (patched("data/0", 6, b"\xff\0"), "zip file version"),
    "big-endian": (in_archive(NONE, byteorder=b"big"), "big-endian"),
    "big-endian legacy": (lambda path: legacy(path, NONE + STOP, machine={"little_endian": False}), "big-endian"),
    **{f"zip of {size}": (truncated(size, "zip"), "") for size in (3, 4, 40, -1)},
    **{f"legacy of {size}": (truncated(size, "legacy"), "") for size in (1, 20, 200, -1)},
    "fewer numbers": (lying(4, bytes(15)), "is truncated: a storage ends at byte"),
    "more elements": (lying(1 << 40, bytes(16)), "is truncated"),
    "more elements in both": (lying(1 << 40, bytes(16), count=1 << 40), "is truncated"),
    "negative elements": (lying(-1, bytes(16)), "is truncated"),
    "the pickle says more": (lying(4, bytes(16), count=1 << 40), "is truncated"),
    "another key": (lying(4, bytes(16), key="1"), "the list of its storages"),
    "no storage in the list": (lambda path: legacy(path, described() + STOP), "has no data in the file"),
    "no storage in the zip": (lambda path: archive(path, described() + STOP), "has no data in the file"),
    "beyond": (in_archive(described(shape=sizes(5))), "needs 20 bytes, its data has 16"),
    "offset beyond": (in_archive(described(offset=number(1))), "needs 20 bytes, its data has 16"),
    "stride beyond": (in_archive(described(shape=sizes(2, 2), stride=sizes(3, 1))), "needs 20 bytes"),
    "expanded": (in_archive(described(shape=sizes(1 << 20, 4), stride=sizes(0, 1))), "repeats 4 numbers 4,194,304"),
    "overlapping rows": (in_archive(described(shape=sizes(3, 2), stride=sizes(1, 1))), "save it after clone"),
    "negative shape": (in_archive(described(shape=sizes(-1))), "a shape, stride or offset that is none"),
    "negative stride": (in_archive(described(stride=sizes(-1))), "a shape, stride or offset that is none"),
    "negative offset": (in_archive(described(offset=number(-1))), "a shape, stride or offset that is none"),
    "huge empty": (in_archive(described(shape=sizes(0, 1 << 40, 1 << 40), stride=sizes(1, 1, 1))), "that is none"),
    "many dimensions": (in_archive(described(shape=sizes(*[1] * 9), stride=sizes(*[1] * 9))), "that is none"),
    "stride missing": (in_archive(described(stride=sizes())), "that is none"),
    "shape of texts": (in_archive(described(shape=sequence(text("a")))), "that is none"),
    "shape of bools": (in_archive(described(shape=sequence(b"\x88"))), "that is none"),
    "conjugated": (
        in_archive(described(storage(), number(0), sizes(4), sizes(1), mapping(conj=b"\x88"))),
        "resolve_conj",
    ),
    "quantized": (
        in_archive(described(storage(kind=name("torch", "QInt8Storage")))),
        "a storage is a torch.QInt8Storage",
    ),
    "a storage of text": (in_archive(described(storage(kind=text("FloatStorage")))), "a storage has no class"),
    "a storage of -1": (in_archive(described(storage(count=number(-1)))), "no key or no size"),
    "a view of a storage": (in_archive(described(VIEW)), "a view of another"),
    "no storage": (in_archive(described(text("a"))), "a tensor has no storage"),
    "unknown dtype": (
        in_archive(call(V3, storage(), number(0), sizes(4), sizes(1), NONE, NONE, name("torch", "qint8"))),
        "a dtype that is not read",
    ),
    "array without content": (in_archive(array(listed())), "an array has no content"),
    "array of fewer": (in_archive(array(sequence(number(1), sizes(2), DTYPE, NONE, text("abc")))), "but 3 bytes"),
    "array of letters": (in_archive(array(sequence(number(1), sizes(1), DTYPE, NONE, text("äöüŁ")))), "text in place"),
    "array of -1": (in_archive(array(sequence(number(1), sizes(-1, -4), DTYPE, NONE, text("a" * 16)))), "that is none"),
}


def same_place(path) -> None:
    """Two files of an archive that are one."""
    archive(path, described() + STOP, {"0": bytes(16), "1": bytes(16)})
    raw = path.read_bytes()
    patch_entry(path, "data/1", 42, raw[raw.rindex(b"archive/data/0") - 4 : raw.rindex(b"archive/data/0")])


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_files_that_are_refused(tmp_path, make, message):
    path = tmp_path / "a.pt"
    make(path)
    with pytest.raises(InputError) as error:
        read_torch_file(path)
    assert str(path) in str(error.value) and message in str(error.value)
    assert texts_at_start(path) is not None


def test_large_pickles_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_files, "LARGEST_PICKLE", 10)
    with pytest.raises(InputError, match="data.pkl has 14 bytes, more than the 10 that are read"):
        read_torch_file(archive(tmp_path / "a.pt", text("abcdefgh") + STOP))


def test_an_instruction_does_not_read_the_numbers_of_a_legacy_file(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_files, "LARGEST_PICKLE", 1 << 20)
    path = legacy(tmp_path / "a.pt", b"\x8d" + (1 << 62).to_bytes(8, "little"))  # a text without end
    os.truncate(path, 1 << 28)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="is damaged or no pickle"):
            read_torch_file(path)
        assert texts_at_start(path) == []
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20


def test_archives_of_more_than_4_gb_are_written_otherwise(tmp_path):
    """Their sizes and places are in an extra field (zip64)."""
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as file:
        for entry, content in (("data.pkl", described() + STOP), ("data/0", struct.pack("<4f", 1, 2, 3, 4))):
            with file.open(f"archive/{entry}", "w", force_zip64=True) as part:
                part.write(content)
    same_bits(read_torch_file(tmp_path / "a.pt"), torch.tensor([1.0, 2, 3, 4]))


def test_files_may_be_larger_than_the_memory(tmp_path):
    """Of a file with a hole in it, twice as large as the memory, only what is looked at is read."""
    count = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    path = legacy(
        tmp_path / "a.pt", described(storage(count=number(count)), shape=sizes(count)) + STOP, {"0": (count, b"")}
    )
    os.truncate(path, path.stat().st_size + 4 * count - 4)
    with path.open("ab") as file:
        file.write(struct.pack("<f", 2.5))
    tensor = read_torch_file(path)
    assert tensor.shape == (count,) and tensor[0] == 0 and tensor[-1] == 2.5


def test_the_start_of_a_file_is_enough_to_know_it(tmp_path):
    assert texts_at_start(archive(tmp_path / "a.pt", text("a") + text("b") + NONE + STOP), most=1) == ["a"]
    assert texts_at_start(legacy(tmp_path / "b.pt", text("a") + b"\xff")) == ["a"]
    assert texts_at_start(tmp_path) == [] and not is_torch_file(tmp_path)


@pytest.mark.parametrize("container", FORMATS)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=5), st.integers(0, 5)), min_size=1, max_size=4))
def test_damaged_files_are_refused_or_read(tmp_path, container, changes):
    """Whatever is changed, an InputError comes out or what is in the file."""
    path = tmp_path / "a.pt"
    if not (tmp_path / "whole.pt").exists():
        content = {"a": [FLOATS, FLOATS.half().T], "b": (torch.nn.Linear(3, 2), np.arange(5)), "c": {"d": None}}
        saved(tmp_path / "whole.pt", content, container)
    raw = (tmp_path / "whole.pt").read_bytes()
    for place, inserted, removed in changes:
        at = int(place * len(raw))
        raw = raw[:at] + inserted + raw[at + removed :]
    path.write_bytes(raw)
    try:
        for value in attributes(read_torch_file(path)).values():
            module_tensors(value[0] if isinstance(value, list) and value else value)
    except InputError as error:
        assert str(path) in str(error) or "pickled module" in str(error)
