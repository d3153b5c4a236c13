"""Steps of `make real` that are done once: which are done again, and what an interrupted one is told."""

import pytest

from bench.real.records import Records
from pruned_vllm.common.errors import InputError

PLANNED = {"text": 1.0, "learn-a": 60.0, "learn-b": 60.0, "serve-a": 1.0}


class Fakes:
    """Three steps that build on each other, and what of them was run."""

    def __init__(self, directory):
        self.directory, self.runs = directory, []

    def run(self, force=(), settings=0, failing=None):
        """Names of the steps that were run, not taken from records."""
        self.runs.clear()
        records = Records(self.directory, PLANNED, force)
        for name, after in {"text": (), "learn-a": ("text",), "learn-b": ("text",), "serve-a": ("learn-a",)}.items():
            chosen = {"value": settings if name == "learn-a" else 0}
            result = records.step(name, chosen, self._action(name, failing), after=after, outputs=(self.output(name),))
            assert result == {"of": name}
        return [name for name, _ in self.runs]

    def output(self, name):
        return self.directory / f"{name}.out"

    def _action(self, name, failing):
        def action(resume):
            self.runs.append((name, resume))
            if name == failing:
                raise KeyboardInterrupt
            self.output(name).touch()
            return {"of": name}

        return action


@pytest.fixture
def fakes(tmp_path):
    fakes = Fakes(tmp_path)
    assert fakes.run() == list(PLANNED)
    return fakes


def test_what_was_done_is_not_done_again(fakes):
    assert fakes.run() == []


def test_other_settings_do_a_step_again_and_what_builds_on_it(fakes):
    assert fakes.run(settings=1) == ["learn-a", "serve-a"]
    assert fakes.run(settings=1) == []


def test_a_lost_output_is_made_again(fakes):
    fakes.output("learn-b").unlink()
    assert fakes.run() == ["learn-b"]


@pytest.mark.parametrize(
    ("force", "expected"),
    [
        (["serve"], ["serve-a"]),
        (["learn-b"], ["learn-b"]),
        (["learn"], ["learn-a", "learn-b", "serve-a"]),
        (["text"], list(PLANNED)),
    ],
)
def test_forced_steps_are_done_again_and_what_builds_on_them(fakes, force, expected):
    assert fakes.run(force) == expected


def test_a_forced_step_that_fails_is_not_done(fakes):
    """Its old record is of a result that was to be replaced."""
    with pytest.raises(KeyboardInterrupt):
        fakes.run(force=["serve"], failing="serve-a")
    assert fakes.run() == ["serve-a"]


def test_a_forced_step_that_does_not_exist_is_refused(fakes):
    with pytest.raises(InputError, match="no step is called lear, learn-c; there are text, learn, serve, text"):
        fakes.run(["lear", "learn-c", "learn"])


def test_an_interrupted_step_is_told_so_unless_its_settings_changed(tmp_path):
    fakes = Fakes(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        fakes.run(failing="learn-a")
    with pytest.raises(KeyboardInterrupt):
        fakes.run(failing="learn-a", settings=1)
    assert fakes.runs == [("learn-a", False)]
    fakes.run(settings=1)
    assert fakes.runs[0] == ("learn-a", True)
    assert not any(resume for _, resume in fakes.runs[1:])


def test_settings_are_compared_as_a_file_holds_them(tmp_path):
    for expected in (1, 0):
        runs = []
        Records(tmp_path, PLANNED).step("text", {"names": ("a", 0.5)}, lambda resume, runs=runs: runs.append(1) or {})
        assert len(runs) == expected


def test_looking_does_nothing(fakes):
    def steps(records, settings=0):
        for name, after in (("text", ()), ("learn-a", ("text",)), ("serve-a", ("learn-a",))):
            chosen = {"value": settings if name == "learn-a" else 0}
            output = fakes.output(name)
            records.step(name, chosen, fakes._action(name, None), after=after, outputs=(output,))

    fakes.runs.clear()
    records = Records(fakes.directory, PLANNED, ["serve"])
    assert not records.are_done(lambda: steps(records)), "one is to be done again"
    steps(records)
    assert [name for name, _ in fakes.runs] == ["serve-a"]
    assert records.are_done(lambda: steps(records)) and not records.are_done(lambda: steps(records, settings=1))
    assert not records.are_done(lambda: records.step("learn-b", {}, fakes._action("learn-b", None), after=("x",)))
    assert len(fakes.runs) == 1 and set(Records(fakes.directory, PLANNED).planned) == set(PLANNED)
