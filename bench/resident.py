"""How much memory this process has resident, as Linux counts it; files that are mapped count."""

import re
from pathlib import Path

STATUS, REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident_bytes() -> int:
    """Now."""
    return _status("VmRSS")


def forget_peak() -> None:
    """From now on `peak_bytes` says what was the most since."""
    REFERENCES.write_text("5")


def peak_bytes() -> int:
    """The most so far."""
    return _status("VmHWM")


def _status(name: str) -> int:
    (kilobytes,) = re.findall(rf"{name}:\s+(\d+) kB", STATUS.read_text())
    return int(kilobytes) * 1024
