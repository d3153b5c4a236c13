"""Reads pickles without running anything that is in them.

A pickle is a program: it names functions to call. Here every name becomes an inert `Stub` that only remembers what it
was called with, but for a short list that describes tensors, arrays and dictionaries, for which there are builders of
our own. No function or class that a pickle names is ever imported.

The interpreter is Python's own in Python (`pickle._Unpickler`): the one in C takes memory by numbers in the file, as
for its list of remembered objects.
"""

import pickle
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from pruned_vllm.common.errors import InputError

# An instruction of one byte can make an object of 200. A pickled model with its tokenizer has about a million.
MOST_STEPS = 5_000_000
MOST_CLASSES = 10_000


class Stub:
    """An object of some class, as a pickle describes it.

    Attributes:
        module, name: of the class or function.
        args: what it was called with.
        state: what `__setstate__` was to get: the attributes of most objects, by name.
        items: what was appended to it or put into it.
    """

    module = name = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs
        self.state: Any = None
        self.items: list[Any] = []

    def __new__(cls, *args: Any, **kwargs: Any) -> "Stub":
        stub = super().__new__(cls)
        stub.__init__(*args, **kwargs)  # type: ignore[misc]  # pickles make objects without calling __init__
        return stub

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def append(self, item: Any) -> None:
        self.items.append(item)

    def extend(self, items: list) -> None:
        self.items += items

    def add(self, item: Any) -> None:
        self.items.append(item)

    update = extend

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute of the object, where its state is a dictionary of them."""
        return self.state.get(name, default) if isinstance(self.state, dict) else default

    def __repr__(self) -> str:
        return f"<{self.module}.{self.name} of a pickle>"


class PickledDict(dict):
    """A dictionary of any class."""

    def __setstate__(self, state: Any) -> None:
        """Attributes of the dictionary itself are nothing that we read."""


class Builder:
    """In place of a function or class that a pickle names: calls `build`, and cannot be changed by the pickle."""

    __slots__ = ("_build",)
    _build: Callable

    def __init__(self, build: Callable) -> None:
        object.__setattr__(self, "_build", build)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._build(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError("a pickle may not change what builds its tensors")

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a pickle may not change what builds its tensors")


def _counted(run: Callable) -> Callable:
    def counted(unpickler: "InertUnpickler") -> None:
        unpickler.steps += 1
        if unpickler.steps > MOST_STEPS:
            raise pickle.UnpicklingError(f"it has more than {MOST_STEPS:,} instructions")
        run(unpickler)

    return counted


class InertUnpickler(pickle._Unpickler):
    """Runs a pickle on stubs.

    Args:
        builders: what stands for the functions and classes that are not stubs, by "module.name".
        persistent_load: what stands for objects outside of the pickle, the storages of tensors; None refuses them.
    """

    dispatch = {code: _counted(run) for code, run in pickle._Unpickler.dispatch.items()}

    def __init__(
        self, file: BinaryIO, builders: dict[str, Callable], persistent_load: Callable[[Any], Any] | None = None
    ) -> None:
        super().__init__(file, encoding="latin1")  # what Python 2 wrote
        self._builders = {"collections.OrderedDict": _dictionary, "collections.defaultdict": _default_dictionary}
        self._builders |= builders
        self._load_persistent = persistent_load
        self._classes: dict[str, Any] = {}
        self.steps = 0

    def find_class(self, module_name: str, global_name: str) -> Any:
        full = f"{module_name}.{global_name}"
        if full in self._builders:
            return Builder(self._builders[full])
        if len(self._classes) >= MOST_CLASSES:
            raise pickle.UnpicklingError(f"it names more than {MOST_CLASSES:,} classes")
        if full not in self._classes:
            self._classes[full] = type("Stub", (Stub,), {"module": module_name, "name": global_name})
        return self._classes[full]

    def persistent_load(self, pid: Any) -> Any:
        if self._load_persistent is None:
            raise pickle.UnpicklingError("it refers to objects outside of the pickle")
        return self._load_persistent(pid)

    def get_extension(self, code: int) -> Any:
        raise pickle.UnpicklingError(f"it uses the extension registry (code {code})")


# What damaged or hostile pickles raise in the interpreter.
DAMAGED = (
    pickle.UnpicklingError,
    *(EOFError, AttributeError, TypeError, ValueError, KeyError, IndexError, OverflowError, MemoryError),
    *(AssertionError, UnicodeError, RecursionError, NotImplementedError, ImportError),
)


def run_pickle(
    file: BinaryIO, where: str, builders: dict[str, Callable], persistent_load: Callable[[Any], Any] | None = None
) -> Any:
    """What a pickle describes; see `InertUnpickler`. Raises InputError, which names `where`."""
    try:
        return InertUnpickler(file, builders, persistent_load).load()
    except InputError:
        raise
    except DAMAGED as error:
        raise InputError(f"{where} is damaged or no pickle: {str(error) or type(error).__name__}") from None


def attributes(value: Any) -> dict[str, Any]:
    """The attributes of a pickled object; of a dictionary, its entries; else nothing."""
    if isinstance(value, Stub):
        return value.state if isinstance(value.state, dict) else {}
    return value if isinstance(value, dict) else {}


def walk_modules(module: Any) -> Iterator[tuple[str, Stub]]:
    """Names and modules of a pickled nn.Module, itself included as "", as `named_modules` gives them."""
    pending, seen = [("", module)], set()
    while pending:
        prefix, current = pending.pop()
        if not isinstance(current, Stub) or id(current) in seen:
            continue
        seen.add(id(current))
        yield prefix, current
        children = current.get("_modules")
        if isinstance(children, dict):
            pending += [(f"{prefix}.{name}" if prefix else str(name), child) for name, child in children.items()]


def _dictionary(*args: Any) -> PickledDict:
    """Python 2 wrote the entries as pairs; later versions set them afterwards."""
    pairs = args[0] if args else []
    if not isinstance(pairs, list | dict):
        raise pickle.UnpicklingError("a dictionary is made of something else than pairs")
    return PickledDict(pairs)


def _default_dictionary(*args: Any) -> PickledDict:
    return PickledDict()
