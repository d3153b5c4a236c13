"""Tensors and arrays as pickles describe them, and the tensors that they are once their numbers are found.

A pickle says of a tensor which storage holds its numbers and how it lies there: offset, shape and stride, as in
torch.as_strided. All of that may be a lie, so every number is checked before torch sees it.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from converter.pickles import BadPickle, Name, Stateful, Stub
from pruned_vllm.common.errors import InputError

MOST_DIMENSIONS = 8
LARGEST_NUMBER = 1 << 48  # of elements: more than any file has
_PLACE = "place_in_file"  # attribute of a tensor that was taken out of a file

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
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "UntypedStorage": torch.uint8,
}
# Tensors of dtypes that are younger than typed storages name their dtype themselves.
NAMED_DTYPES = {
    str(dtype): dtype
    for dtype in (
        *STORAGE_DTYPES.values(),
        *(torch.uint16, torch.uint32, torch.uint64),
        *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
    )
}
NUMPY_DTYPES = {
    **{"f8": torch.float64, "f4": torch.float32, "f2": torch.float16, "b1": torch.bool},
    **{"i8": torch.int64, "i4": torch.int32, "i2": torch.int16, "i1": torch.int8},
    **{"u8": torch.uint64, "u4": torch.uint32, "u2": torch.uint16, "u1": torch.uint8},
}


@dataclass(frozen=True, eq=False)
class Storage:
    """The numbers of one or more tensors: `count` of `dtype`, under `key` in the file."""

    key: str
    dtype: torch.dtype
    count: int


@dataclass(frozen=True, eq=False)
class PickledTensor:
    """A tensor that a pickle describes: a view of a storage, as in torch.as_strided."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def storage_of(identifier: Any) -> Storage:
    """A storage from what stands for it in a pickle: "storage", its class, key, device, number of elements, ..."""
    if not isinstance(identifier, tuple) or len(identifier) < 5 or not _is_text(identifier[0], "storage"):
        raise BadPickle("it refers to something that is no storage")
    kind, key, count = identifier[1], identifier[2], identifier[4]
    if not isinstance(kind, Name) or not isinstance(key, str) or not _are_sizes((count,)):
        raise BadPickle("a storage has no class, no key or no size")
    if kind.name not in STORAGE_DTYPES:
        raise BadPickle(f"a storage is a {kind.module}.{kind.name}, whose numbers are not read")
    if len(identifier) > 5 and identifier[5] is not None:
        raise BadPickle("a storage is a view of another, as torch before 0.4 wrote")
    return Storage(key, STORAGE_DTYPES[kind.name], count)


def _is_text(value: Any, text: str) -> bool:
    return isinstance(value, str) and value == text


def _are_sizes(numbers: Any) -> bool:
    """Whether these can be sizes, offsets or strides of a tensor."""
    if not isinstance(numbers, tuple) or len(numbers) > MOST_DIMENSIONS:
        return False
    return all(type(number) is int and 0 <= number < LARGEST_NUMBER for number in numbers)


def _is_shape(numbers: Any) -> bool:
    """Whether this is a shape, also of an empty tensor, with which torch computes without an overflow."""
    return _are_sizes(numbers) and math.prod(number or 1 for number in numbers) < 1 << 60


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *more: Any) -> PickledTensor:
    """torch._utils._rebuild_tensor and _rebuild_tensor_v2; `more`: requires_grad, hooks, metadata."""
    return _tensor_v3(storage, offset, shape, stride, None, None, None, *more[2:])


def _tensor_v3(
    storage: Any, offset: Any, shape: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, metadata: Any = None
) -> PickledTensor:
    if not isinstance(storage, Storage):
        raise BadPickle("a tensor has no storage")
    if not _is_shape(shape) or not _are_sizes(stride) or not _are_sizes((offset,)) or len(shape) != len(stride):
        raise BadPickle("a tensor has a shape, stride or offset that is none")
    if metadata:
        raise BadPickle("a tensor is to be conjugated or negated; save it after resolve_conj().resolve_neg()")
    chosen = storage.dtype
    if dtype is not None:
        named = NAMED_DTYPES.get(f"{dtype.module}.{dtype.name}") if isinstance(dtype, Name) else None
        if named is None:
            raise BadPickle("a tensor has a dtype that is not read")
        chosen = named
    return PickledTensor(storage, chosen, offset, shape, stride)


def _tensor_of_subclass(function: Any, _kind: Any, arguments: Any, _state: Any) -> Any:
    """A tensor with attributes or of another class than torch.Tensor: the tensor alone."""
    builder = function.builder if isinstance(function, Name) else None
    if builder is None or builder not in (_tensor, _tensor_v3):
        return Stub("torch._tensor", "_rebuild_from_type_v2")  # quantized, or numbers that are elsewhere
    if not isinstance(arguments, tuple) or len(arguments) > MOST_DIMENSIONS:
        raise BadPickle("a tensor is built of nothing")
    return builder(*arguments)


class NumpyDtype(Stateful):
    """dtype("f4"); its state tells the byte order."""

    def __init__(self, name: Any, *_: Any) -> None:
        self.name = name
        self.order: Any = "<"

    def take_state(self, state: Any) -> None:
        self.order = state[1] if isinstance(state, tuple) and len(state) > 1 else None

    @property
    def dtype(self) -> torch.dtype | None:
        """None for those that torch has not: texts, dates, objects, big-endian numbers."""
        is_read = isinstance(self.name, str) and isinstance(self.order, str) and self.order in ("<", "|", "=")
        return NUMPY_DTYPES.get(self.name) if is_read else None


class NumpyArray(Stateful):
    """An array, filled by its state: version, shape, dtype, whether in Fortran's order, bytes.

    Protocol 2 writes bytes as text in which a character is a byte.
    """

    def __init__(self, *_: Any) -> None:
        self.shape: Any = None
        self.dtype: torch.dtype | None = None
        self.is_fortran: Any = False
        self.data: Any = None

    def take_state(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[2], NumpyDtype):
            raise BadPickle("an array has no content")
        _, self.shape, dtype, self.is_fortran, self.data = state
        self.dtype = dtype.dtype
        if self.dtype is None:  # its content may be anything
            return
        if not _is_shape(self.shape) or not isinstance(self.data, str | bytes | bytearray):
            raise BadPickle("an array has a shape that is none, or no numbers")
        if math.prod(self.shape) * self.dtype.itemsize != len(self.data):
            raise BadPickle(f"an array has shape {list(self.shape)}, but {len(self.data):,} bytes")


def _numpy_scalar(dtype: Any, data: Any = b"") -> NumpyArray:
    array = NumpyArray()
    array.take_state((1, (), dtype, False, data))
    return array


def _first(tensor: Any, *_: Any) -> Any:
    """A parameter is its tensor."""
    return tensor


def _size(sizes: Any = ()) -> tuple:
    if not isinstance(sizes, tuple):
        raise BadPickle("a torch.Size is made of no tuple")
    return sizes


BUILDERS: dict[str, Callable] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": _tensor_of_subclass,
    "torch.Size": _size,
    "numpy.dtype": NumpyDtype,
    **{f"numpy.{core}.multiarray._reconstruct": NumpyArray for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _numpy_scalar for core in ("core", "_core")},
}


class TensorMapper:
    """Puts tensors where a pickle describes them. Whatever is shared stays shared.

    Args:
        where: name of the file, for error messages.
        mapped: the file, mapped into memory.
        data: where each storage begins in the file, and its bytes; all inside of the file.
    """

    def __init__(self, where: str, mapped: Any, data: Mapping[str, tuple[int, int]]) -> None:
        self._where, self._mapped, self._data = where, mapped, data
        self._made: dict[int, tuple[Any, Any]] = {}  # by id: what was replaced, which keeps the id, and by what
        self._arrays: dict[int, bytearray] = {}

    def filled(self, root: Any) -> Any:
        """Replaces what is described, at any depth, in place; without recursion, which a file could exhaust.

        Tuples that hold more than numbers and texts become lists. Arrays of texts, dates or objects stay what they are.

        Raises:
            InputError: the numbers are not in the file, or fewer than the tensor has.
        """
        holder = [root]
        pending: list[Any] = [holder]
        seen: set[int] = set()
        while pending:
            container = pending.pop()
            if id(container) in seen:
                continue
            seen.add(id(container))
            if isinstance(container, Stub):
                container.state, container.args = self._value(container.state), self._value(container.args)
                pending += filter(_is_container, (container.state, container.args, container.items))
                continue
            for key, value in list(container.items() if isinstance(container, dict) else enumerate(container)):
                new = self._value(value)
                if new is not value:
                    container[key] = new
                if _is_container(new):
                    pending.append(new)
        return holder[0]

    def _value(self, value: Any) -> Any:
        if not isinstance(value, PickledTensor | NumpyArray | tuple) or not value:
            return value
        if id(value) not in self._made:
            self._made[id(value)] = value, self._new(value)
        return self._made[id(value)][1]

    def _new(self, value: Any) -> Any:
        if isinstance(value, PickledTensor):
            return self._tensor(value)
        if isinstance(value, NumpyArray):
            return value if value.dtype is None else self._array(value, value.dtype)
        holds_more = any(isinstance(item, PickledTensor | NumpyArray | Stub | dict | list | tuple) for item in value)
        return list(value) if holds_more else value

    def _tensor(self, described: PickledTensor) -> torch.Tensor:
        shape, dtype, key = described.shape, described.dtype, described.storage.key
        where = f"{self._where}: a tensor of shape {list(shape)}"
        if key not in self._data:
            raise InputError(f"{where} has no data in the file; it is damaged")
        start, size = self._data[key]
        count = math.prod(shape)
        if not count:
            return torch.empty(shape, dtype=dtype)
        used = sum((length - 1) * step for length, step in zip(shape, described.stride, strict=True)) + 1
        last = (described.offset + used) * dtype.itemsize
        if last > size:
            raise InputError(f"{where} needs {last:,} bytes, its data has {size:,}; the file is damaged")
        if count > used:  # rows that are one row, repeated: a few bytes could ask for any amount of memory
            raise InputError(f"{where} repeats {used:,} numbers {count:,} times in all; save it after clone()")
        offset = start + described.offset * dtype.itemsize
        flat = torch.frombuffer(self._mapped, dtype=dtype, count=used, offset=offset)
        tensor = flat.as_strided(shape, described.stride)
        setattr(tensor, _PLACE, offset)
        return tensor

    def _array(self, array: NumpyArray, dtype: torch.dtype) -> torch.Tensor:
        if not array.data:
            return torch.empty(array.shape, dtype=dtype)
        if id(array.data) not in self._arrays:  # several arrays may name the same bytes, which are copied once
            try:
                raw = array.data.encode("latin1") if isinstance(array.data, str) else array.data
            except UnicodeEncodeError:
                raise InputError(
                    f"{self._where}: an array holds text in place of numbers; the file is damaged"
                ) from None
            self._arrays[id(array.data)] = bytearray(raw)
        flat = torch.frombuffer(self._arrays[id(array.data)], dtype=dtype)
        if array.is_fortran is True:
            return flat.view(array.shape[::-1]).permute(*reversed(range(len(array.shape))))
        return flat.view(array.shape)


def span_in_file(tensor: torch.Tensor) -> tuple[int, int]:
    """Where the numbers of a tensor from a file of torch.save begin and end in that file.

    (0, 0) where they are in none, or not one after another. Reading them there says what mapped memory cannot: that the
    file is truncated meanwhile, or its disk fails.
    """
    start = getattr(tensor, _PLACE, None)
    return (0, 0) if start is None or not tensor.is_contiguous() else (start, start + tensor.nbytes)


def _is_container(value: Any) -> bool:
    return isinstance(value, Stub | dict | list)
