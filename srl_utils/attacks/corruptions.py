"""Corruptions: changes of an image that no gradient is needed for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from srl_utils.images import PIXEL_MAX, PIXEL_MIN, to_model_units


def gaussian_noise(clean: Tensor, sigma: float, *, generators: Sequence[torch.Generator]) -> Tensor:
    """`clean` `[N,3,H,W]` in [-1,1] with white noise of standard deviation `sigma` (units of a [0,1] image).

    The result is clipped to [-1,1]; image i draws from `generators[i]`, on the CPU.
    """
    rows = [torch.randn(clean.shape[1:], generator=generator) for generator in generators]
    return (clean + to_model_units(sigma) * torch.stack(rows).to(clean)).clamp(PIXEL_MIN, PIXEL_MAX)
