"""The memory of a learning run: the state it can be resumed from, and a log of its figures.

While `learn-masks MODEL ckpt/` runs, they lie in `ckpt.unfinished/`:

- job.json     what is learned; only the same job can be resumed
- state.pt     state of the method at its last save; tensors and plain values, read without unpickling code
- learning.csv one row for each step that was logged
- what else a method keeps there, such as Tyr's candidates

When the run has ended the log moves to `ckpt/` and the directory goes.
"""

import csv
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from learner.run.disk import writing
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.filesystem import sync

if TYPE_CHECKING:  # imported when a run asks for TensorBoard, which is optional
    from torch.utils.tensorboard import SummaryWriter

STATE_FILE = "state.pt"
LOG_FILE = "learning.csv"


class Journal:
    """State and log of one run.

    Args:
        directory: where both are kept, and where a method may keep files of its own; exists. None keeps neither state
            nor files.
        tensorboard: directory for TensorBoard's event files; None writes none.
        is_writer: False in all processes but one.

    Raises:
        InputError: TensorBoard is not installed.
    """

    def __init__(self, directory: Path | None = None, tensorboard: Path | None = None, is_writer: bool = True) -> None:
        self.directory = directory
        self._is_writer = is_writer
        self._rows: list[dict[str, float]] = []
        self._tensorboard = tensorboard if is_writer else None
        self._board: SummaryWriter | None = None
        if self._tensorboard is not None:
            try:
                import torch.utils.tensorboard  # noqa: F401  # now, and not after the first step
            except ImportError as error:
                raise InputError("TensorBoard is not installed: pip install 'pruned-vllm[data]'") from error

    def restore(self) -> dict[str, Any] | None:
        """The state that was saved last, or None at the start of a run.

        Raises:
            InputError: the file is damaged.
        """
        if self.directory is None or not (self.directory / STATE_FILE).exists():
            return None
        path = self.directory / STATE_FILE
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            self._rows, state = saved["log"], saved["state"]
        except Exception as error:  # damaged files raise many kinds
            raise InputError(
                f"{path} cannot be read ({type(error).__name__}); remove {self.directory} to begin anew"
            ) from error
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Remembers `state`: tensors, numbers, strings, and lists and dictionaries of these."""
        if self._board is not None:
            self._board.flush()  # what is not flushed is lost if the process ends
        if self.directory is None or not self._is_writer:
            return
        path = self.directory / STATE_FILE
        temporary = path.with_suffix(".partial")
        with writing():
            torch.save({"state": state, "log": self._rows}, temporary)
            sync(temporary)
        os.replace(temporary, path)
        self.write_log(self.directory / LOG_FILE)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Adds a row of figures; all rows of a run have the same names."""
        self._rows.append({"step": step, **values})
        if self._tensorboard is not None:
            if self._board is None:
                from torch.utils.tensorboard import SummaryWriter

                # purge_step: after a resumption TensorBoard drops the points that are written again
                self._board = SummaryWriter(str(self._tensorboard), purge_step=step)
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def write_log(self, path: Path) -> None:
        """Writes all rows as CSV; no file without rows."""
        if self._rows and self._is_writer:
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(self._rows[0]))
                writer.writeheader()
                writer.writerows(self._rows)
