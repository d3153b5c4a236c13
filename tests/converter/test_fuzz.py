"""The fuzz target of tests/fuzz: what it found once, a few cases of every surface, and that it finds what it should."""

import pickle
import time
from random import Random

import pytest
from fuzz.cases import EVIL, Bench, OutOfTime, time_limit
from fuzz.findings import saved
from fuzz.mutations import MUTATORS, OPCODES
from fuzz.surfaces import SURFACES, Seed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pruned_vllm.common.errors import InputError

SEEDS = [(surface, name) for surface, seeds in SURFACES.items() for name in seeds]


@pytest.fixture(scope="module")
def benches(tmp_path_factory):
    """The bench of a seed, made once."""
    made: dict[tuple[str, str], Bench] = {}

    def bench(surface: str, name: str) -> Bench:
        if (surface, name) not in made:
            made[surface, name] = Bench(SURFACES[surface][name], tmp_path_factory.mktemp(f"{surface}-{name}"))
        return made[surface, name]

    return bench


@pytest.mark.parametrize(("surface", "name", "file"), saved(), ids=lambda value: getattr(value, "name", value))
def test_what_was_found_stays_mended(benches, tmp_path, monkeypatch, surface, name, file):
    monkeypatch.chdir(tmp_path)
    assert benches(surface, name).problem(file.read_bytes()) is None


@pytest.mark.parametrize(("surface", "name"), SEEDS)
def test_changed_files_end_with_a_message(benches, tmp_path, monkeypatch, surface, name):
    monkeypatch.chdir(tmp_path)
    bench = benches(surface, name)

    @settings(max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.randoms(use_true_random=False))
    def cases(random):
        assert (problem := bench.problem(bench.changed(random))) is None, problem

    cases()


@pytest.mark.parametrize("mutator", MUTATORS)
def test_every_mutator_changes_something_and_refuses_nothing(mutator):
    for content in (b"", b"{", b'{"a": [1, {"b": null}]}', bytes(range(256)), b"\x80\x02}q\x00." * 3):
        changed = {MUTATORS[mutator](content, Random(number)) for number in range(40)}
        assert len(changed - {content}) > 5
        assert MUTATORS[mutator](content, Random(3)) == MUTATORS[mutator](content, Random(3))


def _raises(path, out):
    raise KeyError("planted")


def _leaves_something(path, out):
    if (path / "file").read_bytes() == b"valid":
        return 0
    out.mkdir()
    print("wrong")
    return 2


def _changes_its_input(path, out):
    if (path / "file").read_bytes() != b"valid":
        (path / "more").touch()
    return 0


def _runs_a_pickle(path, out):
    if (path / "file").read_bytes() != b"valid":
        open("fuzz-evil", "w").close()
    return 0


def _says_nothing(path, out):
    return 0 if (path / "file").read_bytes() == b"valid" else 2


def _fails_oddly(path, out):
    return 0 if (path / "file").read_bytes() == b"valid" else 1


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (_leaves_something, "there is"),
        (_changes_its_input, "the input was changed"),
        (_runs_a_pickle, "was run"),
        (_says_nothing, "without a message"),
        (_fails_oddly, "exit code 1"),
    ],
)
def test_the_target_sees_faults(tmp_path, tmp_path_factory, monkeypatch, run, expected):
    monkeypatch.chdir(tmp_path)

    def make(directory):
        directory.mkdir()
        (directory / "file").write_bytes(b"valid")
        return directory

    bench = Bench(Seed(make, "file", "bytes", run), tmp_path)
    assert expected in bench.problem(b"invalid")
    with pytest.raises(AssertionError, match="the valid input is refused"):
        Bench(Seed(make, "file", "bytes", _raises), tmp_path_factory.mktemp("other"))


def test_the_target_sees_what_takes_too_long(monkeypatch):
    monkeypatch.setattr("fuzz.cases.SECONDS", 0.05)
    with pytest.raises(OutOfTime), time_limit():
        end = time.monotonic() + 60
        while time.monotonic() < end:
            try:
                sum(range(1000))
            except Exception as error:  # what a reader of damaged files may do
                raise InputError("damaged") from error


def test_the_fuzzers_pickles_are_armed(tmp_path, monkeypatch):
    """Python's own unpickler runs them, so it means something that nothing here does."""
    monkeypatch.chdir(tmp_path)
    (armed,) = (opcode for opcode in OPCODES if b"touch" in opcode)
    pickle.loads(b"\x80\x02" + armed + b".")
    assert (tmp_path / EVIL).exists()
