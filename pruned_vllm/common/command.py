"""What all commands share: clear errors with exit code 2. Pure Python."""

import signal
import sys
from collections.abc import Callable

from pruned_vllm.common.errors import InputError
from pruned_vllm.common.signals import handled


def run_command(name: str, body: Callable[[], None]) -> int:
    """Runs `body` and returns the exit code of the command `name`.

    0 when it went well, 2 for problems that the user can mend (InputError, a full disk, missing permission), 130 when
    interrupted. Termination counts as an interrupt, so that outputs in progress are cleaned up.
    """

    def interrupt(signum, frame):
        raise KeyboardInterrupt

    with handled((signal.SIGTERM, signal.SIGHUP), interrupt):
        try:
            body()
        except InputError as error:
            print(_printable(f"{name}: {error}"), file=sys.stderr)
            return 2
        except OSError as error:
            message = f"{name}: {error.strerror or error}: {error.filename or ''}".rstrip(": ")
            print(_printable(message), file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print(f"{name}: interrupted", file=sys.stderr)
            return 130
    return 0


def _printable(message: str) -> str:
    """With the codes that a terminal would obey written out: names of tensors and keys may come from anywhere."""
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in message)
