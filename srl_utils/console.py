"""Show progress bars, and warnings that are not repeated, while a command runs."""

from __future__ import annotations

import logging
import sys
from functools import lru_cache
from typing import Any, TextIO

from tqdm.auto import tqdm

logger = logging.getLogger(__name__)


@lru_cache(maxsize=1024)
def warn_once(message: str) -> None:
    """Log a warning, once for each message and process."""
    logger.warning("%s", message)


TERMINAL_SECONDS, FILE_SECONDS = 0.1, 10.0
"""Least time between two updates: on a terminal the line is redrawn, in a file each update is a line of its own."""


class Lines:
    """A stream for a progress bar outside a terminal: each update becomes a line, as a file cannot be overwritten."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        """Write the line in `text`, which begins with a carriage return; write nothing for empty text."""
        if line := text.strip():
            self.stream.write(f"{line}\n")

    def flush(self) -> None:
        """Flush the stream."""
        self.stream.flush()


def progress_bar(total: int | None, *, desc: str, unit: str, initial: int = 0, disable: bool = False) -> tqdm:
    """Return a progress bar on stderr.

    Change its postfix with `refresh=False` and then call `update`, so that a step costs at most one update.

    Args:
        total: number of units at the end; None if unknown.
        desc: what is being done; shown in front of the bar.
        unit: name of a unit, such as `step`.
        initial: units that were done before.
        disable: show nothing, as in all processes but one.
    """
    place: dict[str, Any] = {"mininterval": TERMINAL_SECONDS}
    if not sys.stderr.isatty():
        # Without a position of its own a bar within another would move the cursor.
        place = {"mininterval": FILE_SECONDS, "file": Lines(sys.stderr), "position": 0}
    return tqdm(total=total, desc=desc, unit=unit, initial=initial, disable=disable, **place)
