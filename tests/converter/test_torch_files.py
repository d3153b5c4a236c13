"""Files of torch.save, zip and legacy: every tensor comes out bit for bit."""

import collections
import sys
import types

import numpy as np
import pytest
import torch
from helpers.torch_files import FLOATS, FORMATS, same_bits, saved

from converter.pickles import Stub
from converter.torch_files import is_state_dict, is_torch_file, module_tensors, read_torch_file, texts_at_start
from pruned_vllm.common.errors import InputError

BYTES = torch.arange(64, dtype=torch.uint8)
TENSORS = {
    **{f"{size} bytes": BYTES[:size] for size in (0, 1, 64)},
    **{
        str(dtype): FLOATS.to(dtype)
        for dtype in (
            *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
            *(torch.int64, torch.int32, torch.int16, torch.int8, torch.bool, torch.complex64, torch.complex128),
            *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
        )
    },
    **{str(dtype): BYTES.view(dtype) for dtype in (torch.uint16, torch.uint32, torch.uint64)},
    "every bfloat16": torch.arange(1 << 16).to(torch.uint16).view(torch.bfloat16),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 7),
    "transposed": FLOATS.T,
    "rows": FLOATS[1:3],
    "columns": FLOATS[:, 2:5],
    "steps": FLOATS[::2, ::3],
    "permuted": FLOATS.view(2, 2, 6).permute(2, 0, 1),
    "parameter": torch.nn.Parameter(FLOATS.clone()),
    "frozen parameter": torch.nn.Parameter(FLOATS.clone(), requires_grad=False),
    "requires grad": FLOATS.clone().requires_grad_(),
}


class Attributed(torch.Tensor):
    """A class of tensors."""


def with_attributes() -> torch.Tensor:
    tensor = FLOATS.clone()
    tensor.partition_dim = 0
    return tensor


TENSORS["attributes"] = with_attributes()
parameter = torch.nn.Parameter(FLOATS.clone())
parameter.partition_dim = 0
TENSORS["parameter with attributes"] = parameter
TENSORS["subclass"] = FLOATS.clone().as_subclass(Attributed)


@pytest.mark.parametrize("container", FORMATS)
@pytest.mark.parametrize("expected", TENSORS.values(), ids=TENSORS)
def test_tensors_come_out_bit_for_bit(tmp_path, expected, container):
    path = saved(tmp_path / "a.pt", {"x": [expected]}, container)
    assert is_torch_file(path)
    same_bits(read_torch_file(path)["x"][0], expected)


@pytest.mark.parametrize("container", FORMATS)
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol(tmp_path, container, protocol):
    content = {"a": FLOATS, "b": {"c": (FLOATS, 3)}, "d": collections.OrderedDict(e=FLOATS[1])}
    torch.save(content, tmp_path / "a.pt", pickle_protocol=protocol, **FORMATS[container])
    assert is_torch_file(tmp_path / "a.pt")
    value = read_torch_file(tmp_path / "a.pt")
    assert value["b"]["c"][0] is value["a"] and value["b"]["c"][1] == 3
    same_bits(value["d"]["e"], FLOATS[1])


@pytest.mark.parametrize("container", FORMATS)
def test_what_was_shared_stays_shared(tmp_path, container):
    pool = torch.arange(100.0)
    value = read_torch_file(saved(tmp_path / "a.pt", [pool, pool[10:30].view(4, 5), pool.view(10, 10).T], container))
    pool, part, turned = value
    assert part.data_ptr() == pool.data_ptr() + 40 and turned.data_ptr() == pool.data_ptr()
    before = (tmp_path / "a.pt").read_bytes()
    pool.zero_()
    assert not part.any() and (tmp_path / "a.pt").read_bytes() == before, "the file must not change with the tensor"


ARRAYS = {
    **{kind: np.arange(12).reshape(3, 4).astype(kind) for kind in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "bool")},
    **{kind: np.arange(12).reshape(3, 4).astype(kind) for kind in ("u8", "u4", "u2", "u1")},
    "fortran": np.asfortranarray(np.arange(24.0).reshape(2, 3, 4)),
    "empty": np.empty((0, 3), dtype="f4"),
    "scalar": np.float32(2.5),
    "no axes": np.array(7),
    "bytes above 127": np.arange(256, dtype="u1"),
}


@pytest.mark.parametrize("container", FORMATS)
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS)
def test_arrays_become_tensors(tmp_path, array, container, protocol):
    torch.save({"x": array, "y": (array, 1)}, tmp_path / "a.pt", pickle_protocol=protocol, **FORMATS[container])
    value = read_torch_file(tmp_path / "a.pt")
    for found in (value["x"], value["y"][0]):
        assert isinstance(found, torch.Tensor)
        np.testing.assert_array_equal(found.numpy(), array)
        assert found.numpy().dtype == array.dtype


def test_arrays_that_torch_has_not_stay_what_they_are(tmp_path):
    arrays = [np.array(["a"]), np.array([None]), np.array([1], dtype=">f4"), np.array(["2026-01-01"], dtype="M8[D]")]
    value = read_torch_file(saved(tmp_path / "a.pt", {"arrays": arrays, "x": FLOATS}, "zip"))
    same_bits(value["x"], FLOATS)
    assert not any(isinstance(array, torch.Tensor) for array in value["arrays"])


# --- modules


def vanishing_module(monkeypatch) -> torch.nn.Module:
    """A model of classes whose code is gone when the file is read."""
    project = types.ModuleType("gone_project")
    source = """
import torch
from torch import nn

class Part(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.head_dim = config, 8
        self.linear = nn.Linear(6, 4, bias=False)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("kept", torch.arange(3))
        self.register_buffer("transient", torch.ones(3), persistent=False)
        self.register_parameter("nothing", None)

class Config:
    def __init__(self):
        self.sizes, self.name = [1, 2], "x"

class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = Config()
        self.parts = nn.ModuleList([Part(self.config), Part(self.config)])
        self.embedding, self.head = nn.Embedding(5, 6), nn.Linear(6, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.turned = nn.Parameter(torch.randn(4, 6).T)
"""
    exec(compile(source, "gone_project.py", "exec"), project.__dict__)
    monkeypatch.setitem(sys.modules, "gone_project", project)
    torch.manual_seed(0)
    return project.Whole()


@pytest.mark.parametrize("container", FORMATS)
def test_modules_whose_classes_are_gone(tmp_path, monkeypatch, container):
    model = vanishing_module(monkeypatch)
    expected = model.state_dict()
    path = saved(tmp_path / "a.pt", {"model": model, "tokenizer": object()}, container)
    monkeypatch.delitem(sys.modules, "gone_project")
    content = read_torch_file(path)
    found = module_tensors(content["model"])
    assert set(found) == set(expected)
    for key, value in expected.items():
        same_bits(found[key], value)
    assert found["head.weight"] is found["embedding.weight"]
    assert "gone_project" not in sys.modules
    whole, part = content["model"], content["model"].get("_modules")["parts"].get("_modules")["0"]
    assert (whole.module, whole.name) == ("gone_project", "Whole")
    assert part.get("head_dim") == 8 and part.get("training") is True and part.get("absent", 5) == 5
    assert part.get("config") is whole.get("config") and whole.get("config").state == {"sizes": [1, 2], "name": "x"}
    assert "gone_project.Whole" in texts_at_start(path)


def linear(weight) -> torch.nn.Module:
    module = torch.nn.Linear(4, 4, bias=False)
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    return module


class Frozen(torch.nn.Linear):
    """Pickled as a call that makes it anew, as torch.fx and others do."""

    def __reduce__(self):
        return torch.nn.Linear, (4, 4)


SHARED = torch.nn.Sequential(linear(FLOATS[:, :4].clone()))
NOT_READ = {
    "sparse": (lambda: linear(torch.eye(4).to_sparse()), "^1.weight of the pickled module is a torch._utils._rebuild_"),
    "meta": (lambda: linear(torch.empty(4, 4, device="meta")), "1.weight of the pickled module is a torch._utils._reb"),
    "made by a call": (lambda: Frozen(4, 4), "The pickled module '1' is a torch.nn.modules.linear.Linear, whose parts"),
    "twice": (lambda: torch.nn.Sequential(SHARED, SHARED), "'1.1' is a part of the model in two places; save the"),
}


@pytest.mark.parametrize(("make", "message"), NOT_READ.values(), ids=NOT_READ)
def test_what_is_not_read_is_not_taken_for_absent(tmp_path, make, message):
    """A sublayer without weights is one that was pruned."""
    activation = torch.nn.SiLU()  # without tensors, it may be anywhere
    path = saved(tmp_path / "a.pt", torch.nn.Sequential(activation, make(), activation), "zip")
    with pytest.raises(InputError, match=message):
        module_tensors(read_torch_file(path))


@pytest.mark.parametrize("container", FORMATS)
def test_state_dicts(tmp_path, container):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    path = saved(tmp_path / "a.bin", model.state_dict(), container)
    value = read_torch_file(path)
    assert is_state_dict(value) and list(value) == list(model.state_dict())
    for key, tensor in model.state_dict().items():
        same_bits(value[key], tensor)
    assert "0.weight" in texts_at_start(path)
    for other in ({}, {"a": 1}, {1: FLOATS}, [FLOATS], Stub("a", "B"), None):
        assert not is_state_dict(other)
