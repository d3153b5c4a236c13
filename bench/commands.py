"""Commands as a user types them, shown and run."""

import shlex
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from pruned_vllm.common.errors import InputError

console = Console(highlight=False)


def script(name: str) -> Path:
    """A console script of this environment."""
    return Path(sys.executable).with_name(name)


def run(*arguments) -> str:
    """Shows and runs a command, and returns it as it was shown. Raises InputError when it fails."""
    words = [str(argument) for argument in arguments]
    shown = ["python" if word == sys.executable else word for word in words]
    shown[0] = Path(shown[0]).name
    text = shlex.join(shown)
    console.print(f"[bold cyan]$ {text}", soft_wrap=True)
    if code := subprocess.run(words).returncode:
        raise InputError(f"{shown[0]} ended with exit code {code}")
    return text
