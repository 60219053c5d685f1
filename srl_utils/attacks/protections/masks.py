"""Masks of images that are inpainted: 1 in the hole, 0 around it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from srl_utils.attacks.draws import Generators, draw

FARTHEST = 0.5  # share of the way to the image's border
BENDS = 4  # random numbers along each side


def central_mask(images: Tensor) -> Tensor:
    """Return a mask `[N,1,H,W]`: 1 in the central square of half the side, which is inpainted, and 0 around it."""
    mask = torch.zeros_like(images[:, :1])
    rows, columns = (side // 4 for side in images.shape[2:])
    mask[:, :, rows : 3 * rows, columns : 3 * columns] = 1
    return mask


def widened_mask(images: Tensor, generators: Generators | None = None) -> Tensor:
    """Return `central_mask` with a hole that reaches further at random, `[N,1,H,W]`, so that less of the image is kept.

    How far it reaches at most is drawn for each image, up to half of the way to the border. How much of that it reaches
    varies smoothly along the contour.

    Args:
        images: `[N,3,H,W]`.
        generators: one CPU generator per image, or None; see `draws.draw`.
    """
    sides = images.shape[2:]
    down, across = (((2 * torch.arange(side) + 1) / side - 1).abs().to(images) for side in sides)
    way = 2 * torch.maximum(down[:, None], across) - 1  # 0 at the central square, 1 at the border
    reach = FARTHEST * draw(torch.rand, (1, 1, 1), generators, like=images)
    shares = functional.interpolate(
        draw(torch.rand, (1, BENDS, BENDS), generators, like=images), sides, mode="bilinear"
    )
    return torch.maximum(central_mask(images), (way < reach * shares).to(images))
