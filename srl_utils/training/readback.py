"""Values that come from the device one step late, so that it always has work queued."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

Label = TypeVar("Label")


@dataclass(frozen=True)
class _Pending(Generic[Label]):
    label: Label
    values: Tensor
    arrived: torch.cuda.Event | None

    def read(self) -> tuple[Label, list[float]]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.label, self.values.tolist()


class Readback(Generic[Label]):
    """Reads a step's values while the device works on the next one.

    Asking a GPU for a value (`.item()`) waits until it has done all that was queued; by the time the next step is
    queued, the values of the one before have come by themselves.
    """

    def __init__(self) -> None:
        self._pending: _Pending[Label] | None = None

    def push(self, label: Label, values: Tensor) -> list[tuple[Label, list[float]]]:
        """Sends `values` `[k]` on their way; returns what was pushed before, with its label, if there is any."""
        arrived = None
        if values.device.type == "cuda":
            values = values.to("cpu", non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        before, self._pending = self._pending, _Pending(label, values, arrived)
        return [before.read()] if before is not None else []

    def drain(self) -> list[tuple[Label, list[float]]]:
        """Waits for what is still on its way."""
        before, self._pending = self._pending, None
        return [before.read()] if before is not None else []
