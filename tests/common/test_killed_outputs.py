"""Output directories of runs that are killed, line by line: none or whole, and nothing of the user's is lost."""

import os
import re
import shutil
import sys
from itertools import count

import pytest
from helpers.killing import killed_at_line
from helpers.outputs import WRITER, content_of, names, write

from pruned_vllm.common.directories import prepare_output

# Files whose lines are counted.
KILLED = ("directories.py", "manifest.py", "filesystem.py", "shutil.py", "outputs.py")


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_at_any_line(out, way, overwrite, step, capfd, monkeypatch):
    """SIGKILL at every `step`-th line that a run executes: what is left is none or whole; the next run cleans up."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # slow, and what it is for is a failing power supply
    kills, seen = 0, set()
    for line in count(1, step):
        shutil.rmtree(out.parent)
        out.parent.mkdir()
        if overwrite:
            write(out, "old")
            (out / "notes.txt").write_text("mine")
        if not killed_at_line(lambda: write(out, "new"), line, KILLED):
            break
        kills += 1
        seen |= {re.sub(r"\.\w{8}\.", ".X.", name) for name in names(out.parent)}
        whole_at_all_times = way == "exchange" and overwrite
        if out.exists() or whole_at_all_times:
            assert content_of(out) in (("old", "new") if overwrite else ("new",)), f"killed at line {line}"
            assert not overwrite or (out / "notes.txt").read_text() == "mine", f"killed at line {line}"
        prepare_output(out, writer=WRITER, overwrite=True)
        assert names(out.parent) in ([], [out.name]), f"killed at line {line}"
        assert out.exists() or not overwrite, f"killed at line {line}"
        write(out, "newer")
        assert content_of(out) == "newer" and names(out.parent) == [out.name], f"killed at line {line}"
        assert not overwrite or (out / "notes.txt").read_text() == "mine", f"killed at line {line}"
    assert kills > 10 and f".{out.name}.X.partial" in seen
    said = capfd.readouterr().out
    assert f"Removed {out.parent}/.{out.name}." in said
    if step == 1:
        was_moved = way == "two renames" and overwrite
        assert (f".{out.name}.X.replaced" in seen) == (f"Put back {out}" in said) == was_moved


def test_an_output_that_is_replaced_is_there_at_every_line(out):
    """Others may read it meanwhile. In this process, and so at every line also where no slow tests run."""
    write(out, "old")
    seen = []

    def look(frame, event, argument):
        if event == "line":
            seen.append(content_of(out))
        return look if frame.f_code.co_filename.endswith("common/directories.py") else None

    before = sys.gettrace()
    sys.settrace(look)
    try:
        write(out, "new")
    finally:
        sys.settrace(before)
    assert seen == sorted(seen, reverse=True) and {"old", "new"} == set(seen)
