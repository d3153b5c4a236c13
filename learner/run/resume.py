"""Where an interrupted run waits to be resumed: `<out>.unfinished/`.

job.json in it says what the job is; only the same job can be resumed.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState

from learner.run.processes import together
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import read_json, write_json
from pruned_vllm.common.signals import uninterrupted

JOB_FILE = "job.json"


def unfinished(out: Path) -> Path:
    return out.with_name(f"{out.name}.unfinished")


@contextmanager
def unfinished_run(
    out: Path,
    job: Any,
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
        can_resume: whether a directory holds a state to resume from.
        processes: all must enter; the first writes.

    Raises:
        InputError: there is an interrupted run, and neither `resume` nor `overwrite`, or it is of another job.
    """
    directory, is_writer = unfinished(out), processes.is_main_process
    asked = json.loads(json.dumps(asdict(job), default=str))
    with together(processes):
        if is_writer and directory.exists():
            if overwrite and not resume:
                shutil.rmtree(directory)
            else:
                _check_resumable(directory, asked, resume)
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


def _check_resumable(directory: Path, asked: dict, resume: bool) -> None:
    if not resume:
        raise InputError(f"{directory} holds an interrupted run; go on with --resume, or forget it with --overwrite")
    try:
        begun = read_json(directory / JOB_FILE)
    except InputError as error:  # it had ended while that was written
        raise InputError(f"{error}, so the run in {directory} cannot be resumed; forget it with --overwrite") from None
    changed = [f"{key}: {begun.get(key)}, now {asked[key]}" for key in asked if begun.get(key) != asked[key]]
    if changed:
        raise InputError(f"{directory} holds a run of another job; forget it with --overwrite:", changed)
