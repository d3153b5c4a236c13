"""Signals, handled for the length of a block. Pure Python."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C, kill, a closed terminal


@contextmanager
def handled(signals: tuple[signal.Signals, ...], handler: Callable | signal.Handlers) -> Iterator[None]:
    """Has `signals` handled by `handler` in the block, and as before after it.

    A signal that is ignored stays ignored: that is how nohup keeps a command running. Python lets only the main thread
    set handlers, and it alone receives signals, so in other threads this does nothing.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in signals}
    # None: the handler was not set from Python and could not be restored.
    before = {number: old for number, old in before.items() if old not in (signal.SIG_IGN, None)}
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def uninterrupted() -> AbstractContextManager[None]:
    """Lets a clean-up come to its end: a second Ctrl-C would leave half of it."""
    return handled(ENDING_SIGNALS, signal.SIG_IGN)
