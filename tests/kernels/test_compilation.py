"""Compiled libraries are kept for the next process, unless somebody else could have put them there."""

import ctypes
import logging
import os
import stat
import subprocess
from pathlib import Path

import pytest

from pruned_vllm.kernels import compilation
from pruned_vllm.kernels.compilation import load_library

COMPILER = os.environ.get("CXX", "c++")
FLAGS = ("-shared", "-fPIC")


@pytest.fixture
def source(tmp_path, monkeypatch, caplog):
    """A function that returns 7, and a cache in tmp_path/cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    path = tmp_path / "seven.cpp"
    path.write_text('extern "C" int seven() { return 7; }')
    return path


@pytest.fixture
def compilations(monkeypatch):
    """The libraries that are compiled."""
    done, compile_one = [], compilation._compile

    def counted(command, source, library):
        compile_one(command, source, library)
        done.append(library)

    monkeypatch.setattr(compilation, "_compile", counted)
    return done


def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "pruned-vllm" / "kernels"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_library_is_compiled_once_for_this_user_alone(source, tmp_path, compilations):
    umask = os.umask(0)
    try:
        assert load_library(source, FLAGS).seven() == 7 and load_library(source, FLAGS).seven() == 7
    finally:
        os.umask(umask)
    (library,) = cache(tmp_path).iterdir()
    assert compilations == [library] and library.name.startswith("seven-")
    for directory in (cache(tmp_path), cache(tmp_path).parent, tmp_path / "cache", library):
        assert mode(directory) == 0o700, directory


@pytest.mark.parametrize("what", ["source", "header", "flags", "compiler", "version", "cpu", "nothing"])
def test_the_name_changes_with_what_changes_the_code(source, tmp_path, compilations, monkeypatch, what):
    load_library(source, FLAGS)
    if what == "source":
        source.write_text('extern "C" int seven() { return 8; }')
    elif what == "header":
        (tmp_path / "eight.h").touch()
    elif what == "compiler":
        monkeypatch.setenv("CXX", f"{COMPILER} -march=native")
    elif what == "cpu":
        monkeypatch.setattr(compilation, "_cpu", lambda: "another CPU")
    elif what == "version":
        upgraded = tmp_path / "upgraded"
        upgraded.write_text(f'#!/bin/sh\n[ -e {tmp_path}/new ] && echo 99\nexec {COMPILER} "$@"')
        upgraded.chmod(0o700)
        monkeypatch.setenv("CXX", str(upgraded))
        load_library(source, FLAGS)
        compilations.pop()
        (tmp_path / "new").touch()
    value = load_library(source, (*FLAGS, "-O2") if what == "flags" else FLAGS).seven()
    assert value == (8 if what == "source" else 7)
    assert len(set(compilations)) == (1 if what == "nothing" else 2)


def test_the_cpu_is_described_by_its_features_not_by_its_clock():
    description = compilation._cpu()
    assert description == compilation._cpu() and description
    if Path("/proc/cpuinfo").exists():
        assert "flags" in description or "Features" in description or "isa" in description
        assert "MHz" not in description


def plant(path: Path) -> None:
    """A library of that name which returns 666."""
    wrong = path.parent / "wrong.cpp"
    wrong.write_text('extern "C" int seven() { return 666; }')
    subprocess.run([COMPILER, *FLAGS, str(wrong), "-o", str(path)], check=True)
    wrong.unlink()


@pytest.mark.parametrize("permissions, owner", [(0o700, 12345), (0o770, None), (0o702, None)])
def test_a_planted_library_is_not_loaded(source, tmp_path, compilations, permissions, owner):
    load_library(source, FLAGS)
    (library,) = compilations
    library.unlink()
    plant(library)
    library.chmod(permissions)
    if owner is not None:
        if os.geteuid():
            pytest.skip("only root gives files away")
        os.chown(library, owner, -1)
    assert load_library(source, FLAGS).seven() == 7
    assert len(compilations) == 2 and mode(library) == 0o700 and library.stat().st_uid == os.geteuid()


def test_a_link_to_a_library_is_not_followed(source, tmp_path, compilations):
    load_library(source, FLAGS)
    (library,) = compilations
    plant(tmp_path / "planted.so")
    library.unlink()
    library.symlink_to(tmp_path / "planted.so")
    assert load_library(source, FLAGS).seven() == 7 and not library.is_symlink()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: cache(path).chmod(0o777),
        lambda path: cache(path).chmod(0o1777),
        lambda path: cache(path).chmod(0o770),
        lambda path: os.chown(cache(path), 12345, -1),
        lambda path: os.chown(cache(path).parent, 12345, -1),
        lambda path: (path / "cache").chmod(0o777),
        lambda path: (cache(path).rmdir(), cache(path).write_text("a file")),
    ],
    ids=["anyone", "sticky", "group", "owner", "parent's owner", "anyone renames", "file"],
)
def test_a_directory_of_others_is_not_used(source, tmp_path, compilations, caplog, spoil):
    cache(tmp_path).mkdir(mode=0o700, parents=True)
    try:
        spoil(tmp_path)
    except PermissionError:
        pytest.skip("only root gives directories away")
    assert load_library(source, FLAGS).seven() == 7
    assert cache(tmp_path).is_file() or not list(cache(tmp_path).iterdir())
    assert "so seven.cpp is compiled at every start" in caplog.text
    assert not compilations[0].parent.exists(), "the temporary directory is left behind"


def test_a_home_that_cannot_be_written(source, tmp_path, compilations, caplog, monkeypatch):
    load_library(source, FLAGS)
    (library,) = compilations
    real = compilation.TemporaryDirectory

    def read_only(dir=None):
        if dir == library.parent:
            raise PermissionError(13, "Permission denied")
        return real(dir=dir)

    monkeypatch.setattr(compilation, "TemporaryDirectory", read_only)
    assert load_library(source, FLAGS).seven() == 7 and len(compilations) == 1, "what is there is used"
    library.unlink()
    assert load_library(source, FLAGS).seven() == 7 and len(compilations) == 2
    assert f"{library.parent} cannot be written" in caplog.text
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert load_library(source, FLAGS).seven() == 7
    assert "/proc/nowhere/pruned-vllm/kernels cannot be used" in caplog.text


def test_what_fails_leaves_nothing(source, tmp_path, monkeypatch):
    source.write_text("no C++")
    with pytest.raises(subprocess.CalledProcessError) as error:
        load_library(source, FLAGS)
    assert "seven.cpp" in error.value.stderr and not list(cache(tmp_path).iterdir())
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(OSError, match="no-such-compiler"):
        load_library(source, FLAGS)
    assert isinstance(ctypes.CDLL(None), ctypes.CDLL) and not list(cache(tmp_path).iterdir())
