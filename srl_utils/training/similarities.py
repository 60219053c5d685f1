"""Rotations and scalings that images and latents take alike, as EQ-VAE draws them (Kouzelis et al., arXiv 2502.09509).

The draws are those of the authors' code (github.com/zelaki/eqvae): with probability 1/2 a rotation by 90, 180 or 270 degrees
together with a scale that is uniform among those of at least 1/4 and below 1 which give latents of whole sides. That code
draws one transformation for a batch. Here each image has its own, which does not depend on the number of processes. Left
out is that a quarter of the other images are made smaller before they are encoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from srl_utils.attacks.draws import Generators, draw
from srl_utils.images.pixels import by_frame

PROBABILITY = 0.5
"""Of a transformation other than the identity: 1 - p_alpha of the paper."""
LEAST_SCALE = Fraction(1, 4)


@dataclass(frozen=True)
class Similarity:
    """A scaling, then a rotation, of squares."""

    scale: Fraction = Fraction(1)
    """Side after over side before, in (0,1]."""
    quarter_turns: int = 0

    def __call__(self, squares: Tensor) -> Tensor:
        """Return images, latents `[N,C,s,s]` or clips `[N,C,T,s,s]`, frame by frame, with sides of `scale * s`."""
        side = int(self.scale * squares.shape[-1])
        scaled = by_frame(
            lambda frames: F.interpolate(frames, size=(side, side), mode="bilinear", align_corners=False), squares
        )
        return scaled.rot90(self.quarter_turns, (-1, -2))


def draw_similarities(generators: Generators, side: int) -> list[Similarity]:
    """Draw one transformation for each image, whose latents have sides of `side`."""
    numbers = draw(torch.rand, (3,), generators, like=torch.empty(len(generators)))
    return [_similarity(*row, side=side) for row in numbers.tolist()]


def mean_area(side: int) -> float:
    """Return the mean area of transformed latents over that of the originals, whose sides are `side`."""
    areas = [(small / side) ** 2 for small in _sides(side)]
    return 1 - PROBABILITY + PROBABILITY * sum(areas) / len(areas)


def members(similarities: Sequence[Similarity]) -> dict[Similarity, list[int]]:
    """Return the numbers of the images that have the same transformation, which are decoded together."""
    groups: dict[Similarity, list[int]] = {}
    for number, similarity in enumerate(similarities):
        groups.setdefault(similarity, []).append(number)
    return groups


def _similarity(chance: float, size: float, turn: float, *, side: int) -> Similarity:
    if chance >= PROBABILITY:
        return Similarity()
    sides = _sides(side)
    return Similarity(Fraction(sides[int(size * len(sides))], side), 1 + int(3 * turn))


def _sides(side: int) -> range:
    """Return the sides of transformed latents; a side of 1 stays."""
    return range(ceil(LEAST_SCALE * side), max(side, 2))
