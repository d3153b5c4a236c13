"""Where an interrupted run waits to be resumed: `<out>.unfinished/`.

job.json in it says what the job is, and holds fingerprints of what it reads: the model and the text. Only the same job
on the same model and text can be resumed. How it is computed may change: the device, how many processes there are,
whether the weights are sharded (fields with `may_change`).
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState

from learner.run.processes import together
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import read_json, write_json
from pruned_vllm.common.signals import uninterrupted
from pruned_vllm.formats.fingerprint import Fingerprint

JOB_FILE = "job.json"
INPUTS = "inputs"  # key of the fingerprints in it


def unfinished(out: Path) -> Path:
    return out.with_name(f"{out.name}.unfinished")


def refuse_unfinished(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Raises InputError if there is an interrupted run, and neither `resume` nor `overwrite`."""
    if unfinished(out).exists() and not resume and not overwrite:
        raise InputError(
            f"{unfinished(out)} holds an interrupted run; go on with --resume, or forget it with --overwrite"
        )


@contextmanager
def unfinished_run(
    out: Path,
    job: Any,
    inputs: dict[str, str],
    can_resume: Callable[[Path], Any],
    processes: Accelerator | PartialState,
    *,
    resume: bool,
    overwrite: bool,
) -> Iterator[Path]:
    """The directory of this run, new unless it is resumed. When the block ends it goes; when it raises, it stays if the
    run can be resumed.

    Args:
        job: a dataclass.
        inputs: what the job reads, by name: a `Fingerprint` of a model as text, or any digest.
        can_resume: whether a directory holds a state to resume from.
        processes: all must enter; the first writes.

    Raises:
        InputError: there is an interrupted run, and neither `resume` nor `overwrite`, or it is of another job, or what
            the job reads has changed since.
    """
    directory, is_writer = unfinished(out), processes.is_main_process
    asked = json.loads(json.dumps(asdict(job) | {INPUTS: inputs}, default=str))
    with together(processes):
        if is_writer and directory.exists():
            if overwrite and not resume:
                shutil.rmtree(directory)
            else:
                refuse_unfinished(out, resume=resume, overwrite=overwrite)
                _check_resumable(directory, asked, job)
        if is_writer and not directory.exists():
            directory.mkdir(parents=True)
            write_json(directory / JOB_FILE, asked)
    try:
        yield directory
    except BaseException:
        if is_writer and not can_resume(directory):
            with uninterrupted():
                shutil.rmtree(directory, ignore_errors=True)
        elif is_writer:
            print(f"The run so far is kept in {directory}; the same command with --resume goes on.")
        raise
    if is_writer:
        shutil.rmtree(directory)


def _what(values: dict[str, Any], job: Any) -> dict[str, Any]:
    """Of the fields of a job as they are in job.json, those that say what is learned, not how it is computed."""
    kept: dict[str, Any] = {}
    for field in fields(job):
        if field.metadata.get("may_change") or field.name not in values:
            continue
        value, nested = values[field.name], getattr(job, field.name)
        kept[field.name] = _what(value, nested) if is_dataclass(nested) and isinstance(value, dict) else value
    return kept


def _check_resumable(directory: Path, asked: dict, job: Any) -> None:
    try:
        begun = read_json(directory / JOB_FILE)
    except InputError as error:  # the process ended while it wrote the file
        raise InputError(f"{error}, so the run in {directory} cannot be resumed; forget it with --overwrite") from None
    before, now = begun.pop(INPUTS, {}), asked[INPUTS]
    was, wanted = (_what(values, job) for values in (begun, asked))
    changed = [f"{key}: {begun.get(key)}, now {asked[key]}" for key in wanted if was.get(key) != wanted[key]]
    if begun.get("revision") is not None and begun["revision"] != asked.get("revision"):
        changed.append(f"the model may have changed on the hub; the run goes on with --revision {begun['revision']}")
    if changed:
        raise InputError(f"{directory} holds a run of another job; forget it with --overwrite:", changed)
    changed = [f"{name}: {_difference(before.get(name), now[name])}" for name in now if before.get(name) != now[name]]
    if changed:
        raise InputError(
            f"What the run in {directory} reads has changed since it began. Put it back, or forget the run with "
            "--overwrite:",
            changed,
        )


def _difference(before: str | None, now: str) -> str:
    """In words, what differs between two of the inputs of `unfinished_run`."""
    if before is None:
        return "the run does not say what it was"
    if Fingerprint.is_one(before) and Fingerprint.is_one(now):
        return ", and ".join(Fingerprint.parse(before).differences(Fingerprint.parse(now)))
    return "changed"
