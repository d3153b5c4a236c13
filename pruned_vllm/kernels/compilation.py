"""Compiles C++ on first use and keeps the library for the next process, where nobody else could have put another one.

It lies in ${XDG_CACHE_HOME:-~/.cache}/pruned-vllm/kernels. Its name changes with whatever changes its code: the source
and the headers beside it, the compiler with its version, the flags, and the CPU, which -march=native asks for. A
directory that other users can write, or that cannot be written, is not used: the library is compiled in a temporary
directory then, at every start.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import stat
import subprocess
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from pruned_vllm.common.files import cache_directory
from pruned_vllm.common.filesystem import sync

logger = logging.getLogger("vllm.pruned_vllm")  # under vLLM's own logging configuration

WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
CPU_KEYS = ("vendor_id", "model name", "flags", "CPU implementer", "CPU part", "Features", "isa")  # of /proc/cpuinfo


def load_library(source: Path, flags: Sequence[str]) -> ctypes.CDLL:
    """The functions of `source`, compiled by c++ or what CXX names. Processes may do so at the same time.

    Raises:
        OSError: no compiler, or the library cannot be loaded.
        ValueError: CXX has a quote that does not end.
        subprocess.CalledProcessError: what the compiler says is in its `stderr`.
    """
    command = [*shlex.split(os.environ.get("CXX", "c++")), *flags]
    name = f"{source.stem}-{_digest(source, command)}.so"
    directory = cache_directory() / "kernels"
    reason = _why_not_private(directory)
    if reason is None and not _is_ours(directory / name):
        try:
            _compile(command, source, directory / name)
        except OSError as error:  # the compiler is there, for it has told its version
            reason = f"{directory} cannot be written ({error})"
    if reason is None:
        return ctypes.CDLL(str(directory / name))
    logger.warning("%s, so %s is compiled at every start", reason, source.name)
    with TemporaryDirectory() as temporary:
        _compile(command, source, Path(temporary) / name)
        return ctypes.CDLL(str(Path(temporary) / name))


def _compile(command: Sequence[str], source: Path, library: Path) -> None:
    """Writes `library`, whole or not at all."""
    with TemporaryDirectory(dir=library.parent) as temporary:
        result = Path(temporary) / library.name
        subprocess.run([*command, str(source), "-o", str(result)], check=True, capture_output=True, text=True)
        result.chmod(0o700)
        sync(result)
        result.replace(library)


def _digest(source: Path, command: Sequence[str]) -> str:
    """Of all that the compiled code depends on."""
    version = subprocess.run([*command, "--version"], check=True, capture_output=True, text=True).stdout
    files = [source, *sorted(source.parent.glob("*.h"))]
    code = "\0".join((shlex.join(command), version, _cpu(), *(path.read_text() for path in files))).encode()
    return hashlib.sha256(code).hexdigest()[:16]


def _cpu() -> str:
    """What the compiler may know of this CPU."""
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(line for line in first if line.partition(":")[0].strip() in CPU_KEYS)


def _is_ours(library: Path) -> bool:
    """Whether this user wrote the file, and nobody else can have changed it."""
    try:
        facts = library.lstat()
    except OSError:
        return False
    return stat.S_ISREG(facts.st_mode) and facts.st_uid == os.geteuid() and not facts.st_mode & WRITABLE_BY_OTHERS


def _why_not_private(directory: Path) -> str | None:
    """Makes the directory, for this user alone; a sentence where that is not possible or others can write it."""
    try:
        directory = directory.resolve()
        for missing in reversed([path for path in (directory, *directory.parents) if not path.exists()]):
            missing.mkdir(mode=0o700, exist_ok=True)
        facts = directory.stat()
        if facts.st_uid != os.geteuid() or facts.st_mode & WRITABLE_BY_OTHERS:
            return f"{directory} belongs to another user, or others may write it (see chmod 700)"
        for parent in directory.parents:
            facts = parent.stat()
            anyone_renames = facts.st_mode & stat.S_IWOTH and not facts.st_mode & stat.S_ISVTX
            if facts.st_uid not in (0, os.geteuid()) or anyone_renames:
                return f"{parent} belongs to another user, or anyone may rename what is in it"
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        return f"{directory} cannot be used ({error})"
    return None
