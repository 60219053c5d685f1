"""Pass images through an autoencoder again and again, as chains of edits do.

Source of the question: Almog et al., "REED-VAE: RE-Encode Decode Training for Iterative Image Editing with
Diffusion Models", Eurographics 2025 (arXiv 2504.18989).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from srl_utils.images.pixels import PIXEL_MAX, PIXEL_MIN


@torch.no_grad()
def reencoded(
    reconstruct: Callable[[Tensor], Tensor], images: Tensor, passes: Sequence[int]
) -> Iterator[tuple[int, Tensor]]:
    """Yield each number of passes and the images after them, `[N,3,H,W]`, clipped to [-1,1] after every pass.

    Args:
        reconstruct: encodes and decodes images.
        images: `[N,3,H,W]` in [-1,1].
        passes: numbers of passes, in ascending order.
    """
    done = 0
    for wanted in passes:
        for _ in range(wanted - done):
            images = reconstruct(images).clamp(PIXEL_MIN, PIXEL_MAX)
        done = wanted
        yield wanted, images
