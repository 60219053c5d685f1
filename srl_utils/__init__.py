"""SRL-VAE: smooth, robust latent encoding for diffusers autoencoders (arXiv 2504.17219)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from srl_utils.pipelines import robust_vae, robustify, sanitize, swap_vae

__all__ = ["robust_vae", "robustify", "sanitize", "swap_vae"]


def __getattr__(name: str) -> Any:
    """Import what is asked for; importing the package alone loads nothing of diffusers."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from srl_utils import pipelines

    return getattr(pipelines, name)
