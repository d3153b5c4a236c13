"""Files of torch.save: a zip archive since torch 1.6, a sequence of pickles before ("legacy"). Nothing in them is run.

    content = read_torch_file(path)
    module_tensors(content["model"])     # {"layers.0.weight": tensor, ...} of a pickled nn.Module

Tensors are mapped into memory, not read: the file may be larger than the memory.
"""

import io
import math
import mmap
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from converter.pickles import Builder, PickledDict, Stub, run_pickle, walk_modules
from pruned_vllm.common.errors import InputError

LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
LARGEST_PICKLE = 1 << 28  # bytes of the pickle in an archive, without tensors; of a 70B model it has about 1 MB

STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
NAMED_DTYPES = {str(dtype): dtype for dtype in STORAGE_DTYPES.values()}


@dataclass(frozen=True)
class Storage:
    """The numbers of one or more tensors: `count` of `dtype`, under `key` in the file."""

    key: str
    dtype: torch.dtype
    count: int


@dataclass(frozen=True)
class PickledTensor:
    """A tensor that a pickle describes: a view of a storage, as in torch.as_strided."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def is_torch_file(path: Path) -> bool:
    """Whether a file was written by torch.save, by its first bytes."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(16)
    # The magic number as protocol 2 pickles it: PROTO 2, LONG1 of 10 bytes.
    return start.startswith((b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."))


def read_torch_file(path: Path) -> Any:
    """What torch.save wrote: dictionaries, lists, numbers, `Stub`s, and tensors that are mapped into memory.

    Raises:
        InputError: it is damaged, in another format, or describes tensors that are not in it.
    """
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        value, data = _read_archive(path) if mapped[:4] == b"PK\x03\x04" else _read_legacy(path, mapped)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # an empty file cannot be mapped; InputError is one too
        raise error if isinstance(error, InputError) else InputError(f"{path} is damaged: {error}") from None
    return _Mapper(path, mapped, data).filled(value)


def module_tensors(module: Any) -> dict[str, torch.Tensor]:
    """Parameters and buffers of a pickled nn.Module by their names in its state_dict."""
    tensors = {}
    for prefix, part in walk_modules(module):
        for kind in ("_parameters", "_buffers"):
            held = part.get(kind)
            for name, tensor in held.items() if isinstance(held, dict) else ():
                if isinstance(tensor, torch.Tensor):
                    tensors[f"{prefix}.{name}" if prefix else str(name)] = tensor
    return tensors


def _read_archive(path: Path) -> tuple[Any, dict[str, tuple[int, int]]]:
    """The content, and where each storage begins in the file and its bytes."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
            if "data.pkl" not in entries:
                raise InputError(f"{path} is a zip archive, but torch.save did not write it: it has no data.pkl")
            if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries.values()):
                raise InputError(f"{path} is compressed or encrypted, which torch.save does not do; save it again")
            if entries["data.pkl"].file_size > LARGEST_PICKLE:
                size = entries["data.pkl"].file_size
                raise InputError(f"{path}: data.pkl has {size:,} bytes, more than the {LARGEST_PICKLE:,} that are read")
            if "byteorder" in entries and archive.read(entries["byteorder"]).strip() != b"little":
                raise InputError(f"{path} was written on a big-endian machine; save it again on another")
            program = archive.read(entries["data.pkl"])
    except (zipfile.BadZipFile, EOFError, NotImplementedError, UnicodeError, OverflowError) as error:
        raise InputError(f"{path} is truncated or damaged: {error}; download or save it again") from None
    value = run_pickle(io.BytesIO(program), f"{path}: data.pkl", _builders(), _storage_of)
    data = {}
    with path.open("rb") as file:
        for name, entry in entries.items():
            if name.startswith("data/"):
                file.seek(entry.header_offset)
                header = file.read(30)
                start = entry.header_offset + 30 + sum(int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
                data[name.removeprefix("data/")] = start, entry.file_size
    return value, data


def _read_legacy(path: Path, file: Any) -> tuple[Any, dict[str, tuple[int, int]]]:
    """As `_read_archive`. Magic number, protocol, machine, content, keys of the storages; then their numbers."""

    def part(persistent_load: Any = None) -> Any:
        return run_pickle(file, str(path), _builders(), persistent_load)

    if part() != LEGACY_MAGIC or part() != LEGACY_PROTOCOL:
        raise InputError(f"{path} is a pickle, but torch.save did not write it")
    machine = part()
    if isinstance(machine, dict) and machine.get("little_endian") is False:
        raise InputError(f"{path} was written on a big-endian machine; save it again on another")
    storages: dict[str, Storage] = {}

    def load(pid: Any) -> Any:
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module":  # with its source; see torch.nn.Module
            return pid[1]
        storage = _storage_of(pid)
        return storages.setdefault(storage.key, storage)

    value, keys = part(load), part()
    if not isinstance(keys, list) or not all(key in storages for key in keys):
        raise InputError(f"{path} is damaged: the list of its storages is not what the tensors need")
    data, size = {}, len(file)
    for key in keys:
        start = file.tell() + 8
        data[key] = start, storages[key].count * storages[key].dtype.itemsize
        if int.from_bytes(file.read(8), "little") != storages[key].count or sum(data[key]) > size:
            raise InputError(f"{path} ({size:,} bytes) is truncated: a storage ends at byte {sum(data[key]):,}")
        file.seek(sum(data[key]))
    return value, data


def _storage_of(pid: Any) -> Storage:
    """A storage from what stands for it in the pickle: ("storage", its class, key, device, number of elements, ...)."""
    if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
        raise pickle.UnpicklingError("it refers to something that is no storage")
    kind, key, count = pid[1], pid[2], pid[4]
    name = getattr(kind, "name", None)
    if name not in STORAGE_DTYPES or type(count) is not int or count < 0 or not isinstance(key, str):
        raise pickle.UnpicklingError(f"a storage is {name!r} with {count!r} elements")
    if len(pid) > 5 and pid[5] is not None:
        raise pickle.UnpicklingError("a storage is a view of another, as torch before 0.4 wrote")
    return Storage(key, STORAGE_DTYPES[name], count)


def _builders() -> dict[str, Any]:
    return {
        "torch._utils._rebuild_tensor": _tensor,
        "torch._utils._rebuild_tensor_v2": _tensor,
        "torch._utils._rebuild_tensor_v3": _tensor_v3,
        "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
        "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
        "torch._tensor._rebuild_from_type_v2": lambda function, kind, args, state: _called(function, args),
        "torch.nn.parameter.Parameter": lambda tensor, *_: tensor,
        "torch.Size": tuple,
        "_codecs.encode": lambda text, *_: text,  # bytes, in pickles of protocol 2
        "numpy.dtype": _NumpyDtype,
        **dict.fromkeys((f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")), _NumpyArray),
        **dict.fromkeys((f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")), _numpy_scalar),
    }


def _called(function: Any, args: Any) -> Any:
    if not isinstance(function, Builder) or not isinstance(args, tuple):
        raise pickle.UnpicklingError("a tensor is built by something that builds no tensors")
    return function(*args)


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> PickledTensor:
    return _tensor_v3(storage, offset, shape, stride, None, None, None)


def _tensor_v3(storage: Any, offset: Any, shape: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any):
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(stride, tuple):
        raise pickle.UnpicklingError("a tensor has no storage or no shape")
    numbers = (offset, *shape, *stride)
    if len(shape) != len(stride) or any(type(number) is not int or not 0 <= number < 1 << 48 for number in numbers):
        raise pickle.UnpicklingError(f"a tensor has shape {shape!r:.80} and stride {stride!r:.80}")
    chosen = storage.dtype if dtype is None else NAMED_DTYPES.get(f"{dtype.module}.{dtype.name}")
    if chosen is None:
        raise pickle.UnpicklingError("a tensor has a dtype that is not read")
    return PickledTensor(storage, chosen, offset, shape, stride)


class _NumpyDtype:
    """dtype("f4"): its state says the byte order, and only little-endian or none is read."""

    def __init__(self, name: Any, *_: Any) -> None:
        self.name, self.order = name, "<"

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]


class _NumpyArray:
    """An array, filled by its state: version, shape, dtype, whether in Fortran's order, bytes."""

    def __init__(self, *_: Any) -> None:
        self.content: tuple | None = None

    def __setstate__(self, state: Any) -> None:
        self.content = state

    def tensor(self) -> torch.Tensor:
        if not isinstance(self.content, tuple) or len(self.content) != 5:
            raise InputError("an array in a pickle has no content")
        _, shape, dtype, is_fortran, data = self.content
        torch_dtype = _numpy_dtype(dtype)
        raw = data.encode("latin1") if isinstance(data, str) else data
        if not isinstance(raw, bytes) or not isinstance(shape, tuple) or not all(type(size) is int for size in shape):
            raise InputError("an array in a pickle holds no numbers")
        if math.prod(shape) * torch_dtype.itemsize != len(raw):
            raise InputError(f"an array in a pickle has shape {list(shape)}, but {len(raw):,} bytes")
        flat = torch.frombuffer(bytearray(raw), dtype=torch_dtype) if raw else torch.empty(0, dtype=torch_dtype)
        return flat.view(shape[::-1]).permute(*reversed(range(len(shape)))) if is_fortran else flat.view(shape)


_NUMPY_DTYPES = {
    **{"f8": torch.float64, "f4": torch.float32, "f2": torch.float16, "i8": torch.int64, "i4": torch.int32},
    **{"i2": torch.int16, "i1": torch.int8, "u1": torch.uint8, "b1": torch.bool},
}


def _numpy_dtype(dtype: Any) -> torch.dtype:
    name = dtype.name if isinstance(dtype, _NumpyDtype) else None
    if name not in _NUMPY_DTYPES or dtype.order == ">":
        raise InputError(f"an array in a pickle has dtype {name!r}, which is not read")
    return _NUMPY_DTYPES[name]


def _numpy_scalar(dtype: Any, data: Any = b"") -> Any:
    array = _NumpyArray()
    array.content = (1, (), dtype, False, data)
    return array


class _Mapper:
    """Puts tensors where a pickle describes them, at any depth; whatever is shared stays shared."""

    def __init__(self, path: Path, mapped: mmap.mmap, data: Mapping[str, tuple[int, int]]) -> None:
        self._path, self._mapped, self._data = path, mapped, data

    def filled(self, root: Any) -> Any:
        """Replaces described tensors in containers in place; without recursion, which a file could exhaust."""
        holder = [root]
        pending: list[Any] = [holder]
        seen: dict[int, Any] = {}
        while pending:
            container = pending.pop()
            if id(container) in seen:
                continue
            seen[id(container)] = container
            if isinstance(container, Stub):
                inside: list[tuple[Any, Any]] = [("state", container.state), ("args", container.args)]
                inside += [("items", container.items)]
            elif isinstance(container, dict):
                inside = list(container.items())
            else:
                inside = list(enumerate(container))
            for key, value in inside:
                new = self._value(value)
                if new is not value:
                    setattr(container, key, new) if isinstance(container, Stub) else container.__setitem__(key, new)
                if isinstance(new, Stub | dict | list):
                    pending.append(new)
        return holder[0]

    def _value(self, value: Any) -> Any:
        if isinstance(value, PickledTensor):
            return self._tensor(value)
        if isinstance(value, _NumpyArray):
            return value.tensor()
        # Tuples cannot be filled later; a list in their place is read alike.
        return list(value) if isinstance(value, tuple) and any(map(_holds_more, value)) else value

    def _tensor(self, described: PickledTensor) -> torch.Tensor:
        storage, itemsize = described.storage, described.dtype.itemsize
        where = f"{self._path}: a tensor of shape {list(described.shape)}"
        if storage.key not in self._data:
            raise InputError(f"{where} has no data; the file is damaged")
        start, size = self._data[storage.key]
        count = math.prod(described.shape)
        used = sum((length - 1) * step for length, step in zip(described.shape, described.stride, strict=True)) + 1
        last = described.offset + used if count else 0
        if last * itemsize > size or start + size > len(self._mapped):
            raise InputError(f"{where} needs {last * itemsize:,} bytes, its data has {size:,}; the file is damaged")
        if count > max(used, 1):  # rows that are one row, repeated: a few bytes could ask for any amount of memory
            raise InputError(f"{where} repeats its numbers; save it after clone()")
        if not count:
            return torch.empty(described.shape, dtype=described.dtype)
        flat = torch.frombuffer(
            self._mapped, dtype=described.dtype, count=used, offset=start + described.offset * itemsize
        )
        return flat.as_strided(described.shape, described.stride)


def _holds_more(value: Any) -> bool:
    return isinstance(value, PickledTensor | _NumpyArray | Stub | dict | list | tuple)


def is_state_dict(value: Any) -> bool:
    """Whether a pickle holds tensors by name, and nothing else."""
    return (
        isinstance(value, PickledDict | dict)
        and bool(value)
        and all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in value.items())
    )
