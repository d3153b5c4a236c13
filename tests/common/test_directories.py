"""Output directories: whole or not at all at every moment, and nothing of the user's is lost."""

import os
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from helpers.outputs import NAMES, WRITER, content_of, names, write

from pruned_vllm.common import directories
from pruned_vllm.common.command import run_command
from pruned_vllm.common.directories import atomic_directory, prepare_output
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.filesystem import exchange
from pruned_vllm.common.manifest import MANIFEST, REPORT_WRITER, users_files


def test_this_system_swaps_directories_in_one_step(tmp_path):
    """Otherwise these tests would not see what most users have."""
    for name in ("one", "other"):
        (tmp_path / name / name).mkdir(parents=True)
    assert exchange(tmp_path / "one", tmp_path / "other")
    assert names(tmp_path / "one") == ["other"] and names(tmp_path / "other") == ["one"]
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "one", tmp_path / "none")


def test_the_users_files_stay(out, way, capsys):
    write(out, "old")
    (out / "notes.txt").write_text("mine")
    (out / "adapter" / "notes.txt").write_text("mine, too")
    (out / "data").symlink_to("/nowhere")
    (out / "notes.txt").chmod(0o400)
    out.chmod(0o750)
    inode = (out / "notes.txt").stat().st_ino
    write(out, "new")
    assert content_of(out) == "new"
    assert (out / "notes.txt").read_text() == "mine" and (out / "adapter" / "notes.txt").read_text() == "mine, too"
    assert (out / "notes.txt").stat().st_ino == inode, "whoever has it open writes to the same file"
    assert (out / "notes.txt").stat().st_mode & 0o777 == 0o400 and out.stat().st_mode & 0o777 == 0o750
    assert os.readlink(out / "data") == "/nowhere"
    assert users_files(out) == ["adapter/notes.txt", "data", "notes.txt"]
    assert f"Kept in {out}, for this command did not write them: adapter/notes.txt, data" in capsys.readouterr().out
    assert names(out.parent) == [out.name]


def test_the_users_files_are_copied_where_the_disk_has_no_links(out, way, monkeypatch):
    write(out, "old")
    (out / "notes.txt").write_text("mine")

    def link(*args, **options):
        raise PermissionError("not here")

    monkeypatch.setattr(os, "link", link)
    write(out, "new")
    assert content_of(out) == "new" and (out / "notes.txt").read_text() == "mine"
    assert names(out.parent) == [out.name]


def test_a_users_file_whose_name_is_needed_gets_another(out, way, capsys):
    write(out, "old")
    (out / "README.md").write_text("mine")
    with atomic_directory(out, writer=WRITER, overwrite=True) as directory:
        (directory / "README.md").write_text("the command's")
    assert (out / "README.md").read_text() == "the command's" and (out / "README.md.kept").read_text() == "mine"
    assert "README.md.kept" in capsys.readouterr().out
    assert names(out) == sorted([MANIFEST, "README.md", "README.md.kept"]) and names(out.parent) == [out.name]


LARGE = "weights" * 3_000_000  # more than is read whole


@pytest.mark.parametrize(
    ("written", "changed"),
    [
        ("old", "changed by hand"),
        ('{"temperature": 0.6}', '{"temperature": 0.7}'),
        (LARGE, LARGE[:500] + "W" * 10_000 + LARGE[10_500:]),  # as training in place leaves the sizes
    ],
    ids=["another size", "a digit", "weights"],
)
def test_what_was_changed_since_is_not_replaced(out, written, changed):
    write(out, written)
    (out / NAMES[0]).write_text(changed)
    for refused in (lambda: write(out, "new"), lambda: prepare_output(out, writer=WRITER, overwrite=True)):
        with pytest.raises(InputError, match="changed since this command wrote them") as error:
            refused()
        assert error.value.problems == (NAMES[0],)
    assert (out / NAMES[0]).read_text() == changed and names(out.parent) == [out.name]
    (out / NAMES[0]).unlink()
    write(out, "new")
    assert content_of(out) == "new"


@pytest.mark.parametrize(
    "make",
    [
        lambda out: out.mkdir(),
        lambda out: (out.mkdir(), (out / "config.json").write_text("{}")),
        lambda out: (out.mkdir(), (out / MANIFEST).write_text('{"writer": "test-')),
        lambda out: (out.mkdir(), (out / MANIFEST).write_text('{"writer": "other", "files": {}}')),
        lambda out: (out.mkdir(), (out / MANIFEST).write_text('{"writer": "test-command"}')),
        lambda out: out.write_text("a file"),
    ],
)
def test_nothing_else_is_replaced(out, make):
    make(out)
    with pytest.raises(InputError, match="was not written by this command|exists"):
        write(out, "new")
    with pytest.raises(InputError, match="exists; choose another"):
        write(out, "new", overwrite=False)
    assert names(out.parent) == [out.name] and os.path.lexists(out)


def test_a_report_goes_with_what_it_reports_on(out):
    write(out, "old")
    for text in ("first", "a second, longer one"):
        with atomic_directory(out / "report", writer=REPORT_WRITER, overwrite=True) as directory:
            (directory / "heads.png").write_text(text)
    (out / "report" / "notes.txt").write_text("mine")
    write(out / "another", "a model of its own")
    write(out, "new")
    assert names(out / "report") == ["notes.txt"] and content_of(out / "another") == "a model of its own"


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_fails_leaves_everything_as_it_was(out, way, overwrite):
    if overwrite:
        write(out, "old")
    before = names(out.parent)
    with pytest.raises(ZeroDivisionError), atomic_directory(out, writer=WRITER, overwrite=overwrite) as directory:
        (directory / "half").write_text("half")
        raise ZeroDivisionError
    assert names(out.parent) == before
    assert not overwrite or content_of(out) == "old"


def test_a_failing_rename_leaves_everything_as_it_was(out, monkeypatch):
    monkeypatch.setattr(directories, "exchange", lambda one, other: False)
    write(out, "old")
    rename = Path.rename

    def failing(self, target):
        if target == out and self.suffix == ".partial":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output"):
        write(out, "new")
    assert content_of(out) == "old" and names(out.parent) == [out.name]


def test_a_second_interrupt_does_not_stop_the_clean_up(out, monkeypatch):
    rmtree = shutil.rmtree

    def interrupted(*args, **options):
        os.kill(os.getpid(), signal.SIGINT)
        rmtree(*args, **options)

    def body():
        with atomic_directory(out, writer=WRITER, overwrite=False) as directory:
            (directory / "half").write_text("half")
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert run_command("test", body) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert names(out.parent) == []


def test_a_run_that_is_alive_is_left_alone(out, capsys):
    other = out.parent / ".out[1].2.abcd1234.partial"  # of an output with a longer name
    other.mkdir()
    with (
        pytest.raises(InputError, match="exists"),  # of two runs the second to end loses
        atomic_directory(out, writer=WRITER, overwrite=False) as alive,
    ):
        (alive / "half").write_text("half")
        write(out, "other", overwrite=False)
        assert (alive / "half").exists()
        assert f"{alive} stays: another run may be writing it" in capsys.readouterr().out
    assert content_of(out) == "other" and names(out.parent) == sorted([other.name, out.name])


def test_without_locks_nothing_is_removed_but_the_old_output_comes_back(out, monkeypatch, capsys):
    """Nobody can tell then whether a run is alive."""
    monkeypatch.setattr("fcntl.flock", lambda *args: (_ for _ in ()).throw(OSError(37, "No locks available")))
    write(out, "old")
    partial = out.parent / f".{out.name}.abcd1234.partial"
    shutil.copytree(out, partial)
    prepare_output(out, writer=WRITER, overwrite=True)
    assert partial.is_dir() and "if there is none, remove it" in capsys.readouterr().out
    out.rename(partial.with_suffix(".replaced"))
    prepare_output(out, writer=WRITER, overwrite=True)
    assert content_of(out) == "old" and names(out.parent) == [out.name]


def test_what_the_new_output_lacks_is_not_removed(out, capsys):
    """A user's file that came into the old directory while its place was taken."""
    write(out, "new")
    replaced = out.parent / f".{out.name}.abcd1234.partial"
    write(replaced, "old")
    (replaced / "late.txt").write_text("mine")
    prepare_output(out, writer=WRITER, overwrite=True)
    assert (replaced / "late.txt").read_text() == "mine"
    assert f"{replaced} stays, for {out} lacks files in it that no command wrote: late.txt" in capsys.readouterr().out
    (replaced / "late.txt").rename(out / "late.txt")
    prepare_output(out, writer=WRITER, overwrite=True)
    assert names(out.parent) == [out.name] and (out / "late.txt").read_text() == "mine"


def test_everything_is_on_the_disk_before_it_takes_its_place(out, monkeypatch):
    events, sync, take_place = [], directories.sync, directories._take_place
    monkeypatch.setattr(directories, "sync", lambda path: (events.append(path.name), sync(path)))
    monkeypatch.setattr(directories, "_take_place", lambda *args: (events.append("renamed"), take_place(*args)))
    write(out, "new")
    before, after = events[: events.index("renamed")], events[events.index("renamed") + 1 :]
    assert {Path(name).name for name in NAMES} | {"adapter", MANIFEST} < set(before)
    assert any(name.endswith(".partial") for name in before) and after == [out.parent.name]


def test_a_full_disk_leaves_nothing(out):
    """On a disk of its own, which only root can mount."""
    out.parent.mkdir(exist_ok=True)
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", out.parent]).returncode:
        pytest.skip("cannot mount a small disk")
    try:
        write(out, "old")
        (out / "notes.txt").write_text("mine")

        def body():
            with atomic_directory(out, writer=WRITER, overwrite=True) as directory:
                for index in range(100):
                    (directory / str(index)).write_text("x" * 1000)

        assert run_command("test", body) == 2
        assert content_of(out) == "old" and names(out.parent) == [out.name]
        write(out, "new")
        assert content_of(out) == "new" and (out / "notes.txt").read_text() == "mine"
    finally:
        subprocess.run(["umount", out.parent], check=True)


def test_an_unwritable_place_is_told(capsys):
    if not os.path.isdir("/sys/kernel"):
        pytest.skip("needs a directory that even root cannot write")
    assert run_command("test", lambda: write(Path("/sys/kernel/out"), "new")) == 2
    assert "test: " in capsys.readouterr().err
    with suppress(FileNotFoundError):
        assert "out" not in names(Path("/sys/kernel"))
