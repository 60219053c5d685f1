"""Let networks with attention be differentiated forwards, and twice."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch.nn.attention import SDPBackend, sdpa_kernel


def differentiable_attention() -> AbstractContextManager[None]:
    """Return a context in which attention has all derivatives: fused kernels have the first one alone, and backwards only."""
    return sdpa_kernel(SDPBackend.MATH)
