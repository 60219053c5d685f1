"""Reading values back from the device one step late, so that it always has work queued."""

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
    """Reads the values of a step while the device computes the next one.

    `.item()` would wait until a GPU has finished everything queued. When the next step is queued, the values of the
    previous one have already arrived.
    """

    def __init__(self) -> None:
        self._pending: _Pending[Label] | None = None

    def push(self, label: Label, values: Tensor) -> list[tuple[Label, list[float]]]:
        """Start copying `values` `[k]` to the host; return the values pushed before, with their label, if any."""
        arrived = None
        if values.device.type == "cuda":
            values = values.to("cpu", non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        before, self._pending = self._pending, _Pending(label, values, arrived)
        return [before.read()] if before is not None else []

    def drain(self) -> list[tuple[Label, list[float]]]:
        """Wait for the last values; return them with their label, if any."""
        before, self._pending = self._pending, None
        return [before.read()] if before is not None else []
