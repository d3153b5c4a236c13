"""Functions that are killed while they run, in forked children."""

import os
import signal
import sys
import traceback
from collections.abc import Callable


def in_child(function: Callable[[], None]) -> int:
    """Starts `function` in a forked child, which ends with exit code 0, or 1 and a traceback; returns its pid."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        function()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ending_of(pid: int) -> int:
    """Waits for a child; its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at_line(function: Callable[[], None], count: int, modules: tuple[str, ...]) -> bool:
    """Runs `function` in a child that kills itself at the `count`-th line that it executes in files of these names.

    Returns whether it came so far. Raises AssertionError when it failed by itself.
    """

    def counted(frame, event, argument):
        nonlocal count
        if event == "call":
            return counted if frame.f_code.co_filename.endswith(modules) else None
        if event == "line":
            count -= 1
            if not count:
                os.kill(os.getpid(), signal.SIGKILL)
        return counted

    def traced():
        sys.settrace(counted)
        function()

    ending = ending_of(in_child(traced))
    assert ending in (0, -signal.SIGKILL), f"the child ended with {ending}"
    return ending != 0
