"""Several processes on one run: what fails in one fails in all.

    accelerate launch --num_processes 2 -m learner.cli MODEL ckpt/ ...                      # GPUs
    torchrun --nproc_per_node 2 -m learner.cli MODEL ckpt/ --device cpu ...

Each process holds the whole model, or with --weights sharded a part of it; see learner/model/placement.py.
`accelerate launch --cpu` starts one process, whatever --num_processes says. Processes that stop for bad input end with
exit code 2; the launchers turn that into 1.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object

from pruned_vllm.common.errors import InputError

T = TypeVar("T")


@contextmanager
def together(accelerator: Accelerator | PartialState) -> Iterator[None]:
    """Every process runs the block, which must not wait for others, and goes on when all have come to its end.

    Without this the others would wait for the one that failed in their next exchange, with NCCL until they are killed.

    Raises:
        InputError: the block raised one, or an OSError, in another process.
    """
    failure = None
    try:
        yield
    except (InputError, OSError) as error:
        failure = error
    problems = gather_object([failure and str(failure)]) if accelerator.num_processes > 1 else []
    if failure is not None:
        raise failure
    for index, problem in enumerate(problems):
        if problem is not None:
            raise InputError(f"process {index}: {problem}")


def of_first(processes: Accelerator | PartialState, make: Callable[[], T]) -> T:
    """What `make`, which the first process calls, returns there; all must call this.

    Raises:
        InputError: it raised one, or an OSError, in the first process.
    """
    with together(processes):
        found: list[Any] = [make()] if processes.is_main_process else [None]
    return (broadcast_object_list(found) if processes.num_processes > 1 else found)[0]


LOST = ("closed by peer", "reset by peer", "Broken pipe")  # in messages of gloo about a process that has ended
NO_MEMORY = ("can't allocate memory", "not enough memory")  # in those of PyTorch's allocator on the CPU


@contextmanager
def explained() -> Iterator[None]:
    """Runs a block that computes, where any process may fail at any time.

    Raises:
        InputError: the memory was not enough, or another process has ended.
    """
    try:
        yield
    except RuntimeError as error:
        message = str(error)
        if isinstance(error, torch.OutOfMemoryError) or any(words in message for words in NO_MEMORY):
            raise InputError(
                f"the memory is not enough: {message.splitlines()[0]}\nLower --micro-batch-size, or "
                "take --gradient-checkpointing; learn-masks --plan says what else helps there"
            ) from error
        if isinstance(error, torch.distributed.DistError) or any(words in message for words in LOST):
            raise InputError("another process has ended; its own message says why") from error
        raise
