"""A progress bar for a page: it reports to the page, and ends the computation when the visitor cancels."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from threading import Event
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

Report = Callable[[float, str], object]
"""Takes the share that is done, in [0,1], and what is being done."""


SETTERS = ("requires_grad_", "__set__")


class Cancelled(Exception):
    """The visitor has cancelled the computation."""


class WatchedBar(tqdm):
    """A bar that `Meter` moves.

    Args:
        report: hears of each step.
        stop: ends the computation at the next step once it is set.
    """

    def __init__(self, report: Report, stop: Event) -> None:
        super().__init__(total=1, file=StringIO())
        self._report, self._stop = report, stop

    def update(self, n: float | None = 1) -> bool | None:
        """Move the bar by `n`.

        Raises:
            Cancelled: if `stop` is set.
        """
        if self._stop.is_set():
            raise Cancelled
        moved = super().update(n)
        self._report(min(self.n / self.total, 1.0), self.desc.removesuffix(": "))
        return moved


class Stoppable(TorchFunctionMode):
    """A context for work that moves no bar: it ends at the next function of a tensor.

    Contexts such as `no_grad` and `frozen` set back what they change by functions of torch, too. These are never stopped; nor
    is anything else, once the computation ends.

    Args:
        stop: the next function of a tensor raises `Cancelled` once it is set.
    """

    def __init__(self, stop: Event) -> None:
        super().__init__()
        self._stop, self._ends = stop, False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function."""
        computes = function.__name__ not in SETTERS and any(isinstance(each, Tensor) for each in args)
        if computes and self._stop.is_set() and not self._ends:
            self._ends = True
            raise Cancelled
        return function(*args, **(kwargs or {}))
