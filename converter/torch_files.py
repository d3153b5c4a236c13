"""Files of torch.save: a zip archive since torch 1.6, a sequence of pickles before ("legacy"). Nothing in them is run.

    content = read_torch_file(path)
    module_tensors(content["model"])     # {"layers.0.weight": tensor, ...} of a pickled nn.Module

Tensors are mapped into memory, not read: the file may be larger than the memory.
"""

import io
import mmap
import os
import pickletools
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from converter.pickled_tensors import BUILDERS, Storage, TensorMapper, storage_of
from converter.pickles import LONGEST_NAME, Name, Stub, run_pickle
from pruned_vllm.common.errors import InputError

ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
LARGEST_PICKLE = 1 << 28  # bytes of what is there without tensors; a 70B model has about 1 MB
LOCAL_HEADER = 30  # bytes of what precedes a file in an archive, without its name and its extra field
NO_RESERVE = 0x4000 if sys.platform == "linux" else 0  # mmap.MAP_NORESERVE, which Python names from 3.13 on

Spans = dict[str, tuple[int, int]]  # where something begins in a file, and its bytes


def is_torch_file(path: Path) -> bool:
    """Whether a file was written by torch.save, by its first bytes; any zip archive may have been."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(32)
    return start.startswith(ZIP_MAGIC) or LEGACY_MAGIC.to_bytes(10, "little") in start


def read_torch_file(path: Path) -> Any:
    """What torch.save wrote: dictionaries, lists, numbers, `Stub`s, and tensors that are mapped into memory.

    Raises:
        InputError: it is damaged, in another format, or describes tensors that are not in it.
    """
    mapped = _map(path)
    value, data = _read_archive(path, mapped) if mapped[:4] == ZIP_MAGIC else _read_legacy(path, mapped)
    return TensorMapper(str(path), mapped, data).filled(value)


def texts_at_start(path: Path, most: int = 200) -> list[str]:
    """The first names ("module.name") and texts in what torch.save wrote: those of `most` instructions of its pickle.

    Enough to tell a state_dict from a pickled module, and both from masks. Empty where the file cannot be read.
    """
    try:
        mapped = _map(path)
        if mapped[:4] == ZIP_MAGIC:
            start, size = _archive_spans(path, mapped)["data.pkl"]
            return _texts(io.BytesIO(mapped[start : start + min(size, 1 << 20)]), most)
        pickles = _map(path, LARGEST_PICKLE)
        for _ in range(3):
            run_pickle(pickles, str(path), {})
        return _texts(pickles, most)
    except (InputError, KeyError):
        return []


def walk_modules(module: Any) -> Iterator[tuple[str, Stub]]:
    """Names and modules of a pickled nn.Module, itself included as "", as `named_modules` gives them.

    Raises:
        InputError: a name is none that a model has, a part is no module, or one with tensors is there twice: the
            tensors of its second place would be missing.
    """
    pending: list[tuple[str, Any]] = [("", module)] if isinstance(module, Stub) else []
    seen: set[int] = set()
    while pending:
        prefix, current = pending.pop()
        if current is None:  # a part that was taken out
            continue
        if not isinstance(current, Stub) or not isinstance(current.state, dict):
            raise InputError(f"The pickled module {prefix[:80]!r} is {_described(current)}, whose parts are not read.")
        if id(current) in seen:
            if any(isinstance(held := current.get(kind), dict) and held for kind in ("_parameters", "_modules")):
                raise InputError(
                    f"The pickled module {prefix[:80]!r} is a part of the model in two places; save the model's "
                    "state_dict, which has the tensors of both"
                )
            continue
        seen.add(id(current))
        yield prefix, current
        children = current.get("_modules")
        if isinstance(children, dict) and id(children) not in seen:
            seen.add(id(children))  # no two modules share their dictionaries, but a pickle can say that they do
            pending += [(_joined(prefix, name), child) for name, child in reversed(children.items())]


def module_tensors(module: Any) -> dict[str, torch.Tensor]:
    """Parameters and buffers of a pickled nn.Module by their names in its state_dict.

    Raises:
        InputError: as `walk_modules`; or one is a tensor of a kind that is not read, as sparse and quantized ones.
    """
    tensors, seen = {}, set()
    transient_names: dict[int, set[str]] = {}  # by id: a pickle can have one list in all modules
    for prefix, part in walk_modules(module):
        transient = part.get("_non_persistent_buffers_set")
        if isinstance(transient, list) and id(transient) not in transient_names:
            transient_names[id(transient)] = {name for name in transient if isinstance(name, str)}
        for kind in ("_parameters", "_buffers"):
            held = part.get(kind)
            if not isinstance(held, dict) or id(held) in seen:
                continue
            seen.add(id(held))
            left_out = transient_names.get(id(transient), set()) if kind == "_buffers" else set()
            for name, tensor in held.items():
                if tensor is None or name in left_out:
                    continue
                full = _joined(prefix, name)
                if not isinstance(tensor, torch.Tensor):
                    kind_of_tensor = _described(tensor)
                    raise InputError(f"{full} of the pickled module is {kind_of_tensor}, whose numbers are not read.")
                tensors[full] = tensor
    return tensors


def is_state_dict(value: Any) -> bool:
    """Whether a pickle holds tensors by name, and nothing else."""
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in value.items())
    )


def _described(value: Any) -> str:
    """What stands where a pickle should have a module or a tensor."""
    return f"a {value.module}.{value.name}" if isinstance(value, Stub) else f"a {type(value).__name__}"


def _joined(prefix: str, name: Any) -> str:
    """The name of a part of the module `prefix`."""
    full = f"{prefix}.{name}" if prefix and isinstance(name, str) else name
    if not isinstance(full, str) or len(full) > LONGEST_NAME or not full.isprintable():
        raise InputError(f"A part of the pickled module {prefix[:80]!r} has a name that is none of a module.")
    return full


def _map(path: Path, most: int = 0) -> mmap.mmap:
    """The file, or its first `most` bytes, as memory of which nothing is read yet; changes stay out of the file."""
    if not path.is_file():  # a pipe would be waited for
        raise InputError(f"{path} {'is no file' if path.exists() else 'is missing'}")
    try:
        with path.open("rb") as file:
            # No reserve: else the system may refuse a private map that is larger than its memory.
            flags, access = mmap.MAP_PRIVATE | NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE
            length = min(most, os.fstat(file.fileno()).st_size)
            return mmap.mmap(file.fileno(), length, flags=flags, prot=access)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError:
        raise InputError(f"{path} is empty; download or save it again") from None


def _texts(file: Any, most: int) -> list[str]:
    found: list[str] = []
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if number == most:
                break
            if isinstance(argument, str) and len(argument) <= LONGEST_NAME and argument.isprintable():
                found.append(argument.replace(" ", ".", 1) if opcode.name == "GLOBAL" else argument)
            elif opcode.name == "STACK_GLOBAL":  # module and name came before
                found.append(".".join(found[-2:]))
    except (ValueError, AssertionError, OverflowError, MemoryError):
        pass  # whoever reads it all will say so
    return found


def _read_archive(path: Path, mapped: mmap.mmap) -> tuple[Any, Spans]:
    """The content, and where the numbers of each storage are."""
    spans = _archive_spans(path, mapped)
    if "data.pkl" not in spans:
        raise InputError(f"{path} is a zip archive, but torch.save did not write it: it has no data.pkl")
    start, size = spans["data.pkl"]
    if size > LARGEST_PICKLE:
        raise InputError(f"{path}: data.pkl has {size:,} bytes, more than the {LARGEST_PICKLE:,} that are read")
    order_start, order_size = spans.get("byteorder", (0, 0))
    if mapped[order_start : order_start + min(order_size, 10)].strip() not in (b"little", b""):
        raise InputError(f"{path} was written on a big-endian machine; save it again on another")
    value = run_pickle(io.BytesIO(mapped[start : start + size]), f"{path}: data.pkl", BUILDERS, storage_of)
    return value, {name[len("data/") :]: span for name, span in spans.items() if name.startswith("data/")}


def _archive_spans(path: Path, mapped: mmap.mmap) -> Spans:
    """Where each file of an archive of torch.save is, by its name below the one directory that holds all.

    `zipfile` reads the directory at the end alone. Checksums are not compared: torch.save can leave them out.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, OverflowError, MemoryError) as error:
        raise InputError(f"{path} is truncated or damaged: {str(error)[:200]}; download or save it again") from None
    spans: Spans = {}
    for entry in entries:
        top, _, name = entry.filename.partition("/")
        where = f"{path}: {entry.filename[:80]!r}"
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise InputError(f"{where} is compressed or encrypted, which torch.save does not do; save it again")
        if name in spans or top != entries[0].filename.partition("/")[0]:
            raise InputError(f"{where} is there twice, or not where torch.save puts it; save it again")
        begin = max(entry.header_offset, 0)
        header = mapped[begin : begin + LOCAL_HEADER]
        # Behind the header come a name and an extra field; their lengths are its last numbers.
        lengths = sum(int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
        start = begin + LOCAL_HEADER + lengths
        is_whole = entry.compress_size == entry.file_size and start + entry.file_size <= len(mapped)
        if not header.startswith(ZIP_MAGIC) or begin != entry.header_offset or not is_whole:
            raise InputError(f"{where} is not where the archive says; the file is truncated or damaged")
        spans[name] = start, entry.file_size
    end = 0
    for name, (start, size) in sorted(spans.items(), key=lambda item: item[1]):
        if start < end:
            raise InputError(f"{path}: {name[:80]!r} shares bytes with another file of the archive; it is damaged")
        end = start + size
    return spans


def _read_legacy(path: Path, mapped: mmap.mmap) -> tuple[Any, Spans]:
    """As `_read_archive`. Magic number, protocol, machine, content, keys of the storages; then their numbers."""
    pickles = _map(path, LARGEST_PICKLE)  # one instruction could ask for the rest of the file

    def part(persistent_load: Any = None) -> Any:
        return run_pickle(pickles, str(path), BUILDERS, persistent_load)

    if not _is_number(part(), LEGACY_MAGIC) or not _is_number(part(), LEGACY_PROTOCOL):
        raise InputError(f"{path} is a pickle, but torch.save did not write it")
    machine = part()
    if isinstance(machine, dict) and machine.get("little_endian") is False:
        raise InputError(f"{path} was written on a big-endian machine; save it again on another")
    storages: dict[str, Storage] = {}

    def load(identifier: Any) -> Any:
        # Classes of modules come with their source; see dump_patches of torch.nn.Module.
        if isinstance(identifier, tuple) and len(identifier) == 4 and isinstance(identifier[1], Name):
            return identifier[1]
        storage = storage_of(identifier)
        return storages.setdefault(storage.key, storage)

    value, keys = part(load), part()
    if not isinstance(keys, list) or not all(isinstance(key, str) and key in storages for key in keys):
        raise InputError(f"{path} is damaged: the list of its storages is not what the tensors need")
    data, size, end = {}, len(mapped), pickles.tell()
    for key in keys:
        start, end = end + 8, end + 8 + storages[key].count * storages[key].dtype.itemsize
        data[key] = start, end - start
        if int.from_bytes(mapped[start - 8 : start], "little") != storages[key].count or end > size:
            raise InputError(f"{path} ({size:,} bytes) is truncated: a storage ends at byte {end:,}")
    return value, data


def _is_number(value: Any, number: int) -> bool:
    return type(value) is int and value == number
