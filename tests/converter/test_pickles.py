"""Pickles are read and never run: hostile ones end in an InputError or in inert objects, at little cost."""

import collections
import copyreg
import importlib
import io
import os
import pickle
import subprocess
import sys
import tracemalloc

import pytest
import torch
from helpers.pickled import (
    FALSE,
    GET_0,
    NONE,
    STOP,
    archive,
    call,
    legacy,
    listed,
    made,
    mapping,
    name,
    number,
    sequence,
    sizes,
    storage,
    tensor,
    text,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from converter import pickles
from converter.composer import is_composer
from converter.pickles import Name, OddKey, Stub, run_pickle
from converter.torch_files import is_state_dict, module_tensors, read_torch_file
from pruned_vllm.common.errors import InputError

INERT = (dict, list, tuple, str, bytes, bytearray, int, float, bool, type(None), Name, Stub, OddKey, torch.Tensor)


def run(program: bytes):
    return run_pickle(io.BytesIO(program), "here", {})


def check_inert(value) -> None:
    """Every object that a pickle made is of a class that does nothing."""
    pending, seen = [value], set()
    while pending:
        current = pending.pop()
        assert type(current) in INERT, f"{type(current)} came out of a pickle"
        if id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, Stub):
            pending += [current.args, current.state, current.items]
        elif isinstance(current, dict):
            pending += [*current.keys(), *current.values()]
        elif isinstance(current, list | tuple):
            pending += current


class Runs:
    """Its pickle calls a function."""

    def __init__(self, function, *arguments) -> None:
        self._called = function, arguments

    def __reduce__(self):
        return self._called


BUILTINS = "__builtin__"
OS_SYSTEM = name("os", "system")
REBUILD = name("torch._utils", "_rebuild_tensor_v2")
HOSTILE = {
    "os.system": lambda c: pickle.dumps(Runs(os.system, f"touch {c}")),
    "subprocess": lambda c: pickle.dumps(Runs(subprocess.check_call, ["touch", c])),
    "exec": lambda c: pickle.dumps(Runs(exec, f"open({c!r}, 'w')")),
    "eval, protocol 0": lambda c: pickle.dumps(Runs(eval, f"open({c!r}, 'w')"), protocol=0),
    "open": lambda c: call(name(BUILTINS, "open"), text(c), text("w")) + STOP,
    "in a list": lambda c: pickle.dumps([1, {"a": Runs(os.system, f"touch {c}")}]),
    "import": lambda c: pickle.dumps(Runs(importlib.import_module, "canary")),
    "a name alone": lambda c: name("canary", "touch") + STOP,
    "a name of two parts": lambda c: text("canary") + text("touch.__call__") + b"\x93" + STOP,
    "a chain of calls": lambda c: (
        call(
            call(name(BUILTINS, "getattr"), call(name(BUILTINS, "__import__"), text("os")), text("system")),
            text(f"touch {c}"),
        )
        + STOP
    ),
    "a call of a call": lambda c: pickle.dumps(Runs(os.system, Runs(str, f"touch {c}"))),
    "torch.storage._load_from_bytes": lambda c: pickle.dumps(
        Runs(torch.storage._load_from_bytes, pickle.dumps(Runs(os.system, f"touch {c}")))
    ),
    "pickle.loads": lambda c: pickle.dumps(Runs(pickle.loads, pickle.dumps(Runs(os.system, f"touch {c}")))),
    "INST": lambda c: b"(" + text(f"touch {c}") + b"ios\nsystem\n" + STOP,
    "OBJ": lambda c: b"(" + OS_SYSTEM + text(f"touch {c}") + b"o" + STOP,
    "NEWOBJ": lambda c: OS_SYSTEM + sequence(text(f"touch {c}")) + b"\x81" + STOP,
    "NEWOBJ_EX": lambda c: OS_SYSTEM + sequence(text(f"touch {c}")) + b"}\x92" + STOP,
    "extension": lambda c: b"\x82\x7f" + sequence(text(f"touch {c}")) + b"R" + STOP,
    "persistent id": lambda c: call(OS_SYSTEM, text(f"touch {c}")) + b"Q" + STOP,
    "persistent id, protocol 0": lambda c: b"Ptouch\n" + STOP,
    "out of band": lambda c: b"\x97" + STOP,
    "read-only": lambda c: b"\x96" + bytes(8) + b"\x98" + STOP,
    "state of a name": lambda c: OS_SYSTEM + mapping(builder=OS_SYSTEM) + b"b" + STOP,
    "state of a builder": lambda c: REBUILD + mapping(builder=OS_SYSTEM, __call__=OS_SYSTEM) + b"b" + STOP,
    "state of our class": lambda c: name("converter.pickles", "Stub") + mapping(get=OS_SYSTEM) + b"b" + STOP,
    "state of a stub": lambda c: made(name("a", "B"), mapping(__class__=OS_SYSTEM, __setstate__=OS_SYSTEM)) + STOP,
    "state of a list": lambda c: b"]" + mapping(append=OS_SYSTEM) + b"b" + STOP,
    "state of a dictionary": lambda c: b"}" + mapping(update=OS_SYSTEM) + b"b" + STOP,
    "state of a text": lambda c: text("a") + mapping(encode=OS_SYSTEM) + b"b" + STOP,
    "state of a tensor": lambda c: tensor() + mapping(shape=sizes(1 << 40)) + b"b" + STOP,
    "state of a storage": lambda c: storage() + mapping(count=number(-1)) + b"b" + STOP,
    "slots": lambda c: made(name("a", "B"), sequence(NONE, mapping(args=OS_SYSTEM, module=OS_SYSTEM))) + STOP,
    "entries of a name": lambda c: OS_SYSTEM + text("a") + NONE + b"s" + STOP,
    "appended to a name": lambda c: OS_SYSTEM + NONE + b"a" + STOP,
    "appended to a text": lambda c: text("a") + NONE + b"a" + STOP,
    "called: a number": lambda c: number(1) + b")R" + STOP,
    "called: a tensor": lambda c: tensor() + b")R" + STOP,
    "called with a list": lambda c: OS_SYSTEM + listed(text(f"touch {c}")) + b"R" + STOP,
    "a tensor of a function": lambda c: (
        call(name("torch._tensor", "_rebuild_from_type_v2"), OS_SYSTEM, NONE, sequence(text(f"touch {c}")), NONE) + STOP
    ),
    "an array of a function": lambda c: (
        call(name("numpy.core.multiarray", "_reconstruct"), OS_SYSTEM)
        + sequence(number(1), sizes(1), OS_SYSTEM, FALSE, text("a"))
        + b"b"
        + STOP
    ),
    "a function of numpy": lambda c: call(name("numpy", "fromfile"), text(c)) + STOP,
}


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A file that must not exist afterwards. Importing the module `canary` makes it."""
    path = tmp_path / "touched"
    (tmp_path / "canary.py").write_text(f"touch = open({str(path)!r}, 'w').close\n")
    monkeypatch.syspath_prepend(tmp_path)
    copyreg.add_extension("os", "system", 0x7F)
    yield path
    copyreg.remove_extension("os", "system", 0x7F)
    assert "canary" not in sys.modules


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("container", ["pickle", "archive", "legacy"])
def test_nothing_is_run(tmp_path, canary, hostile, container):
    program, modules, classes = hostile(str(canary)), set(sys.modules), dict(vars(Stub))
    try:
        if container == "pickle":
            value = run(program)
        elif container == "archive":
            value = read_torch_file(archive(tmp_path / "a.pt", program, {"0": bytes(16)}))
        else:
            value = read_torch_file(legacy(tmp_path / "a.pt", program))
    except InputError as error:
        assert "here" in str(error) or "a.pt" in str(error)
    else:
        check_inert(value)
    assert not canary.exists(), "the pickle was run"
    new = {module for module in set(sys.modules) - modules if not module.startswith("encodings.")}
    assert not new, "the pickle imported something"
    assert dict(vars(Stub)) == classes, "the pickle changed a class"


def test_the_canary_would_sing(canary):
    """The table above is worth something only if a real unpickler runs what is in it."""
    pickle.loads(HOSTILE["a chain of calls"](str(canary)))
    assert canary.exists()


def test_hostile_objects_are_described():
    value = run(pickle.dumps(Runs(os.system, "touch x"), protocol=4))
    assert (value.module, value.name, value.args) == ("posix", "system", ("touch x",))
    assert repr(value) == "<posix.system of a pickle>"


# What costs much memory or time in an interpreter that trusts the numbers, copies or hashes.
THOUSANDS = 5000
DOUBLED = b")" + b"2\x86" * 80  # a tuple of two that are one, and so on: as a tree it has 2^80 leaves
MANY = b"(" + NONE * THOUSANDS + b"tq\x00"
ONE_ARRAY = call(name("numpy.core.multiarray", "_reconstruct"), name("numpy", "ndarray"), sizes(0), NONE)
FLOATS = call(name("numpy", "dtype"), text("f4"))
BOMBS = {
    "memo": NONE + b"r\xff\xff\xff\xff" + STOP,
    "memo of a huge number": NONE + b"p" + b"9" * 4000 + b"\n" + STOP,
    "memo of equal hashes": NONE + b"p2305843009213693951\n" + STOP,
    "text of 2^62": b"\x8d" + (1 << 62).to_bytes(8, "little") + STOP,
    "bytes of 2^62": b"\x8e" + (1 << 62).to_bytes(8, "little") + STOP,
    "bytes of 2^40": b"\x96" + (1 << 40).to_bytes(8, "little") + STOP,
    "text of 4 GB": b"X\xff\xff\xff\xff" + STOP,
    "frame of 2^60": b"\x80\x04\x95" + (1 << 60).to_bytes(8, "little") + NONE + STOP,
    "doubled key": b"}" + DOUBLED + NONE + b"s" + STOP,
    "doubled element": b"\x8f(" + DOUBLED + b"\x90" + STOP,
    "doubled frozen element": b"(" + DOUBLED + b"\x91" + STOP,
    "doubled shape": tensor(shape=DOUBLED) + STOP,
    "doubled size of a storage": tensor(storage(count=DOUBLED)) + STOP,
    "doubled key of a storage": sequence(text("storage"), NONE, DOUBLED, NONE, NONE) + b"Q" + STOP,
    "doubled persistent id": DOUBLED + b"Q" + STOP,
    "doubled dtype": call(name("numpy", "dtype"), DOUBLED) + STOP,
    "doubled content": listed(DOUBLED) + STOP,
    "arguments": listed(MANY, *[name("a", "B") + GET_0 + b"R"] * THOUSANDS) + STOP,
    "arguments of a builder": listed(MANY, *[REBUILD + GET_0 + b"R"] * THOUSANDS) + STOP,
    "dictionaries of one": listed(MANY, *[name("collections", "OrderedDict") + GET_0 + b"\x85R"] * THOUSANDS) + STOP,
    "sizes of one": listed(MANY, *[name("torch", "Size") + GET_0 + b"\x85R"] * THOUSANDS) + STOP,
    "tuples that hold more": listed(b"(" + b"]" * THOUSANDS + b"tq\x00", *[listed(GET_0)] * THOUSANDS) + STOP,
    "names": listed(text("a" * 900) + b"q\x000", text("b") + b"q\x010", *[GET_0 + b"h\x01\x93"] * THOUSANDS) + STOP,
    "long names": text("a" * 100_000) + text("b") + b"\x93" + STOP,
    "keys of equal hashes": b"}("
    + b"".join(number(i * ((1 << 61) - 1)) + NONE for i in range(THOUSANDS))
    + b"u"
    + STOP,
    "arrays of the same bytes": listed(
        text("\0" * 400_000) + b"q\x00",
        *[ONE_ARRAY + sequence(number(1), sizes(100_000), FLOATS, FALSE, GET_0) + b"b"] * 1000,
    )
    + STOP,
    "deep lists": b"]" * 30_000 + b"a" * 29_999 + STOP,
    "deep tuples": b")" + b"\x85" * 30_000 + STOP,
    "deep objects": NONE + b"".join([name("a", "B") + b")\x81"] * 20_000) + b"b" * 20_000 + STOP,
    "deep calls": name("a", "B") + b")R" * 20_000 + STOP,
    "marks": b"(" * 100_000 + STOP,
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_bombs_cost_memory_in_proportion_to_their_size(tmp_path, bomb):
    path = archive(tmp_path / "a.pt", bomb, {"0": bytes(16)})
    read_torch_file(archive(tmp_path / "first.pt", NONE + STOP))  # what is loaded late does not count
    tracemalloc.start()
    try:
        read_torch_file(path)
    except InputError:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 2_000_000 + 400 * len(bomb)


def test_a_pickle_has_no_more_instructions_than_any_model(monkeypatch):
    monkeypatch.setattr(pickles, "MOST_INSTRUCTIONS", 100)
    assert run(b"N0" * 49 + NONE + STOP) is None
    with pytest.raises(InputError, match="here is damaged or no pickle: it has more than 100 instructions"):
        run(b"N0" * 50 + NONE + STOP)


def test_modules_that_share_everything_are_read_once(tmp_path):
    parameters = mapping(**{f"p{index}": tensor() for index in range(500)}) + b"q\x000"
    part = made(name("a", "Part"), mapping(_parameters=GET_0, _modules=b"}"))
    parts = mapping(**{f"m{index}": part for index in range(500)})
    program = parameters + made(name("a", "Whole"), mapping(_modules=parts)) + STOP
    whole = read_torch_file(archive(tmp_path / "a.pt", program, {"0": bytes(16)}))
    assert list(module_tensors(whole)) == [f"m0.p{index}" for index in range(500)]


def test_modules_in_circles_end():
    ring = name("a", "B") + b")\x81q\x00" + mapping(_modules=mapping(again=GET_0), _parameters=b"}") + b"b" + STOP
    with pytest.raises(InputError, match="'again' is a part of the model in two places"):
        module_tensors(run(ring))


@pytest.mark.parametrize("part", ["a\x1b[31m", "a" * 2000, "\ud800"])
def test_names_of_modules_are_names(part):
    ring = made(name("a", "B"), mapping())
    value = run(ring + STOP)
    value.state = {"_modules": {part: Stub("a", "B")}}
    with pytest.raises(InputError, match="has a name that is none of a module"):
        module_tensors(value)


def test_plain_pickles_come_out_as_they_went_in():
    shared = ["shared"]
    content = {
        "numbers": [0, -1, 255, 65535, -(2**31), 2**31, 2**70, 1.5, float("inf"), True, False, None],
        "texts": ["", "a", "ä" * 300, "\n'"],
        "nested": {"a": ({"b": [()]}, (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)), 3: shared, None: shared, 1.5: 0, b"k": 1},
        "bytes": [b"", b"\xff" * 300, bytearray(b"abc")],
    }
    for protocol in range(3, pickle.HIGHEST_PROTOCOL + 1):  # before, bytes were calls
        value = run(pickle.dumps(content, protocol=protocol))
        expected = content if protocol >= 5 else content | {"bytes": [b"", b"\xff" * 300, value["bytes"][2]]}
        assert value == expected
        assert value["nested"][3] is value["nested"][None]
    for protocol in range(3):
        value = run(pickle.dumps({key: content[key] for key in ("numbers", "texts")}, protocol=protocol))
        assert value == {key: content[key] for key in ("numbers", "texts")}


def test_dictionaries_and_sets_of_every_kind():
    content = [
        collections.OrderedDict(a=1, b=2),
        collections.defaultdict(list, {"a": [1]}),
        {1, 2},
        frozenset({3}),
        {("a", "b"): 1, (1, (2,)): 2},
        collections.Counter("aab"),
    ]
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        ordered, default, numbers, frozen, odd, counter = run(pickle.dumps(content, protocol=protocol))
        assert (ordered, default, sorted(numbers), frozen) == ({"a": 1, "b": 2}, {"a": [1]}, [1, 2], [3])
        assert [(key.value, value) for key, value in odd.items()] == [(("a", "b"), 1), ((1, (2,)), 2)]
        assert (counter.name, counter.args) == ("Counter", ({"a": 2, "b": 1},))


def test_keys_are_no_longer_than_names():
    """What looks for tensors by their names would search for hours in a text like this one."""
    text = "transformer." * 100_000
    content = run(pickle.dumps({text: 1, text.encode(): 2, "a" * pickles.LONGEST_NAME: 3}, protocol=4))
    assert [type(key) for key in content] == [OddKey, OddKey, str]
    assert not is_composer(content) and not is_state_dict(content)


SAMPLE = pickle.dumps({"a": [1, (2.5, "text"), {"b": None}], "b": Runs(os.getcwd)}, protocol=2)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(SAMPLE)), st.binary(max_size=6), st.integers(0, 6))
def test_damaged_pickles_are_refused_or_inert(place, inserted, removed):
    try:
        check_inert(run(SAMPLE[:place] + inserted + SAMPLE[place + removed :]))
    except InputError as error:
        assert str(error).startswith("here is damaged or no pickle: ")
