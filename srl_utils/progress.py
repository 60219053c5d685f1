"""Progress bars that read well on a terminal and in a log file."""

from __future__ import annotations

import sys

from tqdm.auto import tqdm

TERMINAL_SECONDS, FILE_SECONDS = 0.1, 10.0
"""Least time between two updates: on a terminal the line is redrawn, in a file each update is a line of its own."""


def progress_bar(total: int | None, *, desc: str, unit: str, initial: int = 0, disable: bool = False) -> tqdm:
    """Return a progress bar on stderr.

    Change its postfix with `refresh=False` and then call `update`, so that a step costs one update at most.

    Args:
        total: number of units at the end; None where it is not known.
        desc: what is being done, in front of the bar.
        unit: name of what is counted, such as `step`.
        initial: units that were done before.
        disable: whether to show nothing, as for all processes but one.
    """
    return tqdm(
        total=total,
        desc=desc,
        unit=unit,
        initial=initial,
        disable=disable,
        mininterval=TERMINAL_SECONDS if sys.stderr.isatty() else FILE_SECONDS,
    )
