"""What directories that must not be lost need of the file system: sync, lock, swap. Pure Python."""

import ctypes
import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

AT_FDCWD = -100  # from Linux's fcntl.h: paths are relative to the working directory
RENAME_EXCHANGE = 2  # from Linux's fs.h


def sync(path: Path) -> None:
    """Brings a file, or the names in a directory, to the disk itself, where they outlast a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems do not sync directories
            raise
    finally:
        os.close(descriptor)


@contextmanager
def locked(directory: Path) -> Iterator[bool | None]:
    """Holds the lock of `directory` in the block, unless another process does. The kernel frees it when a process dies.

    Yields True; False where another process or thread holds it; None where the file system has no locks (NFS), so that
    nobody can tell.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        yield _try_lock(descriptor)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool | None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def exchange(one: Path, other: Path) -> bool:
    """Swaps the names of two directories in one step; False, and nothing done, where the system has no such step.

    Linux has it on its own file systems (ext4, xfs, btrfs, tmpfs ...), not on NFS.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))
