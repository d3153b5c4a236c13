"""Pickles and files of torch.save put together by hand, so that they can say what torch.save never would."""

import io
import pickle
import struct
import zipfile
from pathlib import Path

STOP, NONE, FALSE, GET_0 = b".", b"N", b"\x89", b"h\x00"
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


def name(module: str, attribute: str) -> bytes:
    """A function or class."""
    return f"c{module}\n{attribute}\n".encode()


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def sequence(*items: bytes) -> bytes:
    """A tuple."""
    return b"(" + b"".join(items) + b"t"


def listed(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"l"


def mapping(**items: bytes) -> bytes:
    return b"(" + b"".join(text(key) + value for key, value in items.items()) + b"d"


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + sequence(*arguments) + b"R"


def made(kind: bytes, state: bytes) -> bytes:
    """An object of a class, with its attributes."""
    return kind + b")\x81" + state + b"b"


FLOATS, COUNT = name("torch", "FloatStorage"), number(4)


def storage(key: str = "0", kind: bytes = FLOATS, count: bytes = COUNT) -> bytes:
    return sequence(text("storage"), kind, text(key), text("cpu"), count) + b"Q"


def sizes(*values: int) -> bytes:
    return sequence(*map(number, values))


FOUR_FLOATS, ZERO, FOUR, ONE = storage(), number(0), sizes(4), sizes(1)


def tensor(numbers=FOUR_FLOATS, offset=ZERO, shape=FOUR, stride=ONE, *more: bytes) -> bytes:
    hooks = call(name("collections", "OrderedDict"))
    rebuild = name("torch._utils", "_rebuild_tensor_v2")
    return call(rebuild, numbers, offset, shape, stride, FALSE, hooks, *more)


def archive(path: Path, program: bytes, storages: dict[str, bytes] | None = None, **entries: bytes) -> Path:
    """A zip file as torch.save writes it; `entries` are more files in it."""
    files = {"data.pkl": program, **{f"data/{key}": raw for key, raw in (storages or {}).items()}, "version": b"3\n"}
    with zipfile.ZipFile(path, "w") as file:
        for entry, content in {**files, **entries}.items():
            file.writestr(f"archive/{entry}", content)
    return path


def legacy(path: Path, program: bytes, storages: dict[str, tuple[int, bytes]] | None = None, machine=None) -> Path:
    """A file as torch.save wrote it before 1.6; storages: key -> number of elements that it claims, bytes."""
    machine = machine or {"protocol_version": PROTOCOL, "little_endian": True, "type_sizes": {}}
    content = io.BytesIO()
    for part in (MAGIC, PROTOCOL, machine):
        content.write(pickle.dumps(part, protocol=2))
    content.write(program)
    content.write(pickle.dumps(list(storages or {}), protocol=2))
    for count, raw in (storages or {}).values():
        content.write(struct.pack("<q", count) + raw)
    path.write_bytes(content.getvalue())
    return path
