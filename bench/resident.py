"""How much memory this process has, as Linux counts it."""

import re
import threading
import time
from pathlib import Path

STATUS, REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")
INTERVAL_S = 0.002


def forget_peak() -> None:
    """From now on `peak_bytes` says what was the most since."""
    REFERENCES.write_text("5")


def peak_bytes() -> int:
    """The largest resident set so far; files that are mapped count."""
    return _status("VmHWM")


class OwnMemory:
    """Looks again and again at the memory that is this process' own, without mapped files; `peak_bytes` is the most."""

    def __init__(self) -> None:
        self.peak_bytes = self.now()
        threading.Thread(target=self._watch, daemon=True).start()

    def now(self) -> int:
        return _status("RssAnon")

    def forget_peak(self) -> None:
        self.peak_bytes = self.now()

    def _watch(self) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes, self.now())
            time.sleep(INTERVAL_S)


def _status(name: str) -> int:
    (kilobytes,) = re.findall(rf"{name}:\s+(\d+) kB", STATUS.read_text())
    return int(kilobytes) * 1024
