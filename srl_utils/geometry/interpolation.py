"""Paths between two points: how far the output of a network goes, and how evenly."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST = 1e-12
"""Keeps ratios finite if two outputs are equal."""


class Path(NamedTuple):
    """How outputs move while the input moves evenly on a straight line, `[N]` each."""

    length: Tensor
    """Length of the path over the straight distance of its ends: 1 if it is straight."""
    worst_jump: Tensor
    """Longest step over the mean step: 1 if the output moves evenly."""


@torch.no_grad()
def path(function: Callable[[Tensor], Tensor], start: Tensor, end: Tensor, *, num_steps: int) -> Path:
    """Return the path of the outputs between two inputs.

    Args:
        function: maps `[N,...]` to `[N,...]`.
        start: `[N,...]`.
        end: `[N,...]`.
        num_steps: equal steps from the start to the end.
    """
    outputs = [function(torch.lerp(start, end, number / num_steps)) for number in range(num_steps + 1)]
    steps = torch.stack([_distance(outputs[number + 1], outputs[number]) for number in range(num_steps)])
    length = steps.sum(dim=0)
    straight = _distance(outputs[-1], outputs[0])
    longest = steps.amax(dim=0) * num_steps
    # Equal ends have no path: it is straight and even.
    return Path(
        torch.where(length == 0, 1.0, length / straight.clamp_min(SMALLEST)),
        torch.where(length == 0, 1.0, longest / length.clamp_min(SMALLEST)),
    )


def _distance(outputs: Tensor, others: Tensor) -> Tensor:
    return (outputs - others).flatten(1).norm(dim=1)
