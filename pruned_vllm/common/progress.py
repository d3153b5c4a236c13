"""Progress bars on stderr that do not flood a log file. Pure Python."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

LOG_INTERVAL = 30  # seconds between two lines where stderr is no terminal


def progress_bar(iterable: Iterable | None = None, **options: Any) -> tqdm:
    """tqdm: as often as usual on a terminal, every LOG_INTERVAL seconds in a file or a pipe."""
    if not sys.stderr.isatty():
        options = {"mininterval": LOG_INTERVAL, "maxinterval": 2 * LOG_INTERVAL, **options}
    return tqdm(iterable, **options)
