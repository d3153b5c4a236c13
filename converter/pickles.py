"""Reads pickles without running anything that is in them.

A pickle is a program: it names functions, calls them and sets attributes of what they return. Here every name stays a
name. Nothing is imported, and nothing is called but a short list of our own builders, which describe tensors and
arrays. Every other call becomes a `Stub`, which remembers what was called and with what.

`pickletools` of the standard library takes the instructions apart and runs none of them. What they do is done here, to
objects that have no methods of their own, so that no instruction reaches code that the pickle chose. Time and memory
are bounded by the size of the pickle: an instruction copies nothing that another one made, and nothing is hashed but
texts and numbers.
"""

import pickletools
from collections.abc import Callable, Mapping
from typing import Any

from pruned_vllm.common.errors import InputError

# A pickled model with its tokenizer has up to 2 million. One instruction costs about 300 bytes at most.
MOST_INSTRUCTIONS = 3_000_000
MOST_ARGUMENTS = 16  # of what builders are called with
LONGEST_NAME = 1000  # characters of the name of a function, a class or a tensor, and of any other key
MEMO_SIZE = 1 << 32  # what four bytes can count
# Python numbers have their own value as their hash up to here; larger ones could be chosen to have the same.
LARGEST_HASHED = 1 << 60


class BadPickle(ValueError):
    """What keeps a pickle from being read; ends a sentence that begins with its place."""


class Name:
    """A function or class that a pickle names.

    Attributes:
        builder: what is called in its place; None makes a `Stub`.
    """

    __slots__ = ("builder", "module", "name")

    def __init__(self, module: str, name: str, builder: Callable | None) -> None:
        self.module, self.name, self.builder = module, name, builder


class Stub:
    """An object as a pickle describes it.

    Attributes:
        module, name: of the function or class that was called for it.
        args: what that was called with.
        state: what `__setstate__` was to get: the attributes of most objects, by name.
        items: what was appended to it, or pairs of what was put into it.
    """

    __slots__ = ("args", "items", "module", "name", "state")

    def __init__(self, module: str, name: str, args: Any = ()) -> None:
        self.module, self.name, self.args = module, name, args
        self.state: Any = None
        self.items: list[Any] = []

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute of the object, where its state is a dictionary of them."""
        return attributes(self).get(name, default)

    def __repr__(self) -> str:
        return f"<{self.module}.{self.name} of a pickle>"


class Stateful:
    """What a builder may return if the pickle describes its content afterwards."""

    def take_state(self, state: Any) -> None:
        raise NotImplementedError


class OddKey:
    """A key of a dictionary that is neither number nor text of the length of a name.

    Hashing it might take any time, so it is not hashed; nor do readers search a text without end for the names of
    tensors.
    """

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


def run_pickle(
    file: Any,
    where: str,
    builders: Mapping[str, Callable],
    persistent_load: Callable[[Any], Any] | None = None,
) -> Any:
    """What a pickle describes: dictionaries, lists, tuples, texts, numbers, `Stub`s and what builders return.

    Sets become lists. Dictionaries of every kind become plain ones, whose own attributes are left out.

    Args:
        file: binary, with read and readline; it is read up to the end of the pickle.
        where: its name in error messages.
        builders: what stands for functions and classes that are not to become stubs, by "module.name". They must copy
            nothing of their arguments.
        persistent_load: what stands for objects outside of the pickle, the storages of tensors; None refuses them.

    Raises:
        InputError: it is damaged, or does what no pickle of torch.save does.
    """
    try:
        return _Machine({**_CONTAINERS, **builders}, persistent_load).run(file)
    except InputError:
        raise
    except (ValueError, TypeError, IndexError, AssertionError, OverflowError, MemoryError) as error:
        text = str(error)[:200] if isinstance(error, ValueError) else ""  # pickletools quotes whole texts
        raise InputError(f"{where} is damaged or no pickle: {text or type(error).__name__}") from None


def attributes(value: Any) -> dict[str, Any]:
    """The attributes of a pickled object; of a dictionary, its entries; else nothing."""
    if isinstance(value, Stub):
        return value.state if isinstance(value.state, dict) else {}
    return value if isinstance(value, dict) else {}


class _Machine:
    """A stack, a memo, and what each instruction does to them."""

    def __init__(self, builders: Mapping[str, Callable], persistent_load: Callable[[Any], Any] | None) -> None:
        self._builders, self._persistent_load = builders, persistent_load
        self._stack: list[Any] = []
        self._marks: list[int] = []  # heights of the stack
        self._memo: dict[int, Any] = {}

    def run(self, file: Any) -> Any:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if number >= MOST_INSTRUCTIONS:
                raise BadPickle(f"it has more than {MOST_INSTRUCTIONS:,} instructions")
            if opcode.name in _VALUES:
                self._stack.append(argument)
            elif opcode.name in _CONSTANTS:
                self._stack.append(_CONSTANTS[opcode.name])
            elif opcode.name in _STEPS:
                _STEPS[opcode.name](self, argument)
            elif opcode.name not in _IGNORED:
                raise BadPickle(f"it has the instruction {opcode.name}, which torch.save does not write")
        return self._pop()  # STOP is the last one

    # The stack

    def _pop(self) -> Any:
        self._top()
        return self._stack.pop()

    def _top(self) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise BadPickle("it takes more from its stack than there is")
        return self._stack[-1]

    def _pop_to_mark(self) -> list[Any]:
        if not self._marks:
            raise BadPickle("it goes back to a mark that is not there")
        height = self._marks.pop()
        taken = self._stack[height:]
        del self._stack[height:]
        return taken

    def _mark(self, _: Any) -> None:
        self._marks.append(len(self._stack))

    def _discard(self, _: Any) -> None:
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._pop()

    def _discard_to_mark(self, _: Any) -> None:
        self._pop_to_mark()

    def _duplicate(self, _: Any) -> None:
        self._stack.append(self._top())

    # The memo

    def _get(self, index: int) -> None:
        if index not in self._memo:
            raise BadPickle("it refers to an object that it has not made")
        self._stack.append(self._memo[index])

    def _put(self, index: int) -> None:
        if not 0 <= index < MEMO_SIZE:
            raise BadPickle("it numbers an object out of range")
        self._memo[index] = self._top()

    # Containers

    def _tuple(self, size: int) -> None:
        taken = [self._pop() for _ in range(size)]
        self._stack.append(tuple(reversed(taken)))

    def _dictionary(self, items: list[Any]) -> None:
        self._stack.append({})
        self._set_items(items)

    def _append(self, items: list[Any]) -> None:
        container = self._top()
        if not isinstance(container, list | Stub):
            raise BadPickle("it appends to what is no list")
        (container.items if isinstance(container, Stub) else container).extend(items)

    def _set_items(self, items: list[Any]) -> None:
        container = self._top()
        pairs = list(zip(items[::2], items[1::2], strict=True))
        if isinstance(container, Stub):
            container.items += pairs
        elif isinstance(container, dict):
            container.update((key if _can_be_hashed(key) else OddKey(key), value) for key, value in pairs)
        else:
            raise BadPickle("it sets entries of what is no dictionary")

    # Names and calls

    def _name(self, module: Any, name: Any) -> None:
        is_name = isinstance(module, str) and isinstance(name, str) and len(module) + len(name) <= LONGEST_NAME
        if not is_name or not module.isprintable() or not name.isprintable():  # names get into messages
            raise BadPickle("a function or class has a name that is none")
        self._stack.append(Name(module, name, self._builders.get(f"{module}.{name}")))

    def _call(self, called: Any, arguments: Any) -> None:
        if not isinstance(called, Name | Stub) or not isinstance(arguments, tuple):
            raise BadPickle("it calls what is no function and no class")
        if isinstance(called, Stub) or called.builder is None:
            self._stack.append(Stub(called.module, called.name, arguments))
        elif len(arguments) <= MOST_ARGUMENTS:
            self._stack.append(called.builder(*arguments))
        else:
            raise BadPickle(f"it builds a tensor of {len(arguments):,} arguments")

    def _reduce(self, _: Any) -> None:
        arguments, called = self._pop(), self._pop()
        self._call(called, arguments)

    def _new_object_with_keywords(self, _: Any) -> None:
        self._pop()
        self._reduce(_)

    def _object(self, _: Any) -> None:
        called, *arguments = self._pop_to_mark()
        self._call(called, tuple(arguments))

    def _instance(self, names: str) -> None:
        arguments = self._pop_to_mark()
        self._name(*names.split(" ", 1))
        self._call(self._pop(), tuple(arguments))

    def _stack_name(self, _: Any) -> None:
        name, module = self._pop(), self._pop()
        self._name(module, name)

    def _build(self, _: Any) -> None:
        state, built = self._pop(), self._top()
        if isinstance(built, Stub):
            built.state = state
        elif isinstance(built, Stateful):
            built.take_state(state)
        elif not isinstance(built, dict):  # attributes of a dictionary, as the _metadata of a state_dict
            raise BadPickle("it sets attributes of what has none")

    def _persistent(self, identifier: Any) -> None:
        if self._persistent_load is None:
            raise BadPickle("it refers to objects outside of the pickle")
        self._stack.append(self._persistent_load(identifier))


def _can_be_hashed(key: Any) -> bool:
    """Whether hashing takes no longer than reading did, and a pickle cannot choose keys of the same hash."""
    if type(key) is int:
        return -LARGEST_HASHED < key < LARGEST_HASHED
    if type(key) in (str, bytes):
        return len(key) <= LONGEST_NAME
    return key is None or type(key) in (bool, float)


def _as_list(items: Any = None) -> Any:
    """A set from the list of its elements, as a list."""
    if not isinstance(items, list | None):
        raise BadPickle("a set is made of what is no list")
    return [] if items is None else items


_CONTAINERS: dict[str, Callable] = {
    "collections.OrderedDict": lambda: {},
    "collections.defaultdict": lambda *_: {},
    **{f"{module}.{name}": _as_list for module in ("builtins", "__builtin__") for name in ("set", "frozenset")},
    # How protocol 2 writes bytes; as text in which a character is a byte. Encoding would copy it.
    "_codecs.encode": lambda text, _: text,
    **{f"{module}.bytes": lambda: b"" for module in ("builtins", "__builtin__")},
}
_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_IGNORED = ("PROTO", "FRAME", "STOP")
_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine._mark,
    "POP": _Machine._discard,
    "POP_MARK": _Machine._discard_to_mark,
    "DUP": _Machine._duplicate,
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine._get),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine._put),
    "MEMOIZE": lambda machine, _: machine._put(len(machine._memo)),
    **dict.fromkeys(("EMPTY_LIST", "EMPTY_SET"), lambda machine, _: machine._stack.append([])),
    **dict.fromkeys(("LIST", "FROZENSET"), lambda machine, _: machine._stack.append(machine._pop_to_mark())),
    "EMPTY_DICT": lambda machine, _: machine._stack.append({}),
    "DICT": lambda machine, _: machine._dictionary(machine._pop_to_mark()),
    "TUPLE": lambda machine, _: machine._stack.append(tuple(machine._pop_to_mark())),
    "TUPLE1": lambda machine, _: machine._tuple(1),
    "TUPLE2": lambda machine, _: machine._tuple(2),
    "TUPLE3": lambda machine, _: machine._tuple(3),
    "APPEND": lambda machine, _: machine._append([machine._pop()]),
    **dict.fromkeys(("APPENDS", "ADDITEMS"), lambda machine, _: machine._append(machine._pop_to_mark())),
    "SETITEM": lambda machine, _: machine._set_items([machine._pop(), machine._pop()][::-1]),
    "SETITEMS": lambda machine, _: machine._set_items(machine._pop_to_mark()),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), _Machine._reduce),
    "NEWOBJ_EX": _Machine._new_object_with_keywords,
    "OBJ": _Machine._object,
    "INST": _Machine._instance,
    "GLOBAL": lambda machine, names: machine._name(*names.split(" ", 1)),
    "STACK_GLOBAL": _Machine._stack_name,
    "BUILD": _Machine._build,
    "PERSID": _Machine._persistent,
    "BINPERSID": lambda machine, _: machine._persistent(machine._pop()),
}
