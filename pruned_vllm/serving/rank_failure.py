"""A tensor-parallel rank that fails while all ranks compute ends its process, so that the others need not wait for it.

The other ranks wait for it in their next collective. vLLM asks the first rank for the result, and reads what happened
on other ranks only after that, which is never. But it watches whether the processes of all ranks live: where one ends,
it ends the others and the engine, within 10 seconds. A failure while weights are loaded needs nothing of this: there
are no collectives, and vLLM waits for all ranks at once.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger

logger = init_logger("vllm.pruned_vllm")

SECONDS_TO_REPORT = 2


@contextmanager
def failing_together() -> Iterator[None]:
    """Around what all ranks do together: an error on another rank than the first goes to the log and ends the process.

    vLLM reports the first rank's errors itself. Where all ranks fail alike, it gets the time to do so.
    """
    try:
        yield
    except Exception:
        rank = get_tensor_model_parallel_rank()
        if rank == 0:
            raise
        logger.exception("Tensor-parallel rank %d failed. It ends now, and all other ranks with it.", rank)
        time.sleep(SECONDS_TO_REPORT)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # an orderly exit would leave the process groups first, which waits for the other ranks
