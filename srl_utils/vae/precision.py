"""Raise half precision to full where results are added up or compared."""

from __future__ import annotations

import torch
from torch import Tensor


def full_precision(tensor: Tensor) -> Tensor:
    """Return half-precision values as float32, and float32 and float64 values as they are."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
