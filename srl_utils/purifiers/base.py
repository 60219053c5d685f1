"""What a purifier is, and how purifiers are chained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from srl_utils.attacks.draws import Generators
from srl_utils.images.pixels import PIXEL_MAX, PIXEL_MIN

DENOISER = 0.2
"""Cost of a denoiser's forward call for one image, in passes through encoder and decoder of a VAE."""
SEPARATOR = "+"
"""Between the names of a chain, the first one in front."""


class Autoencoder(Protocol):
    """A VAE that purifiers use, such as a `Codec`."""

    @property
    def device(self) -> torch.device:
        """Return the device that images have to be on."""

    def reconstruct(self, images: Tensor) -> Tensor:
        """Return reconstructions of images, both `[N,3,H,W]` in [-1,1]; with gradients, if they are enabled."""


@dataclass(frozen=True, kw_only=True)
class Purifier:
    """A change of images that weakens perturbations.

    Attributes:
        name: as commands and results write it, such as `jpeg-75`.
        apply: images `[N,3,H,W]` in [-1,1] and one CPU generator per image to as many images on the same device. Without
            generators it draws from PyTorch's global generator. Image i of the result depends on image i and its generator
            alone.
        differentiable: whether gradients pass, so that an attacker can take it into account.
        random: whether it draws.
        passes: cost of one image, in passes through encoder and decoder of a VAE.
    """

    name: str
    apply: Callable[[Tensor, Generators | None], Tensor]
    differentiable: bool = True
    random: bool = False
    passes: float = 0.0

    def __call__(self, images: Tensor, generators: Generators | None = None) -> Tensor:
        """Return purified images, `[N,3,H,W]` in [-1,1]; see `apply` for the arguments."""
        return self.apply(images, generators).clamp(PIXEL_MIN, PIXEL_MAX)


def chain(purifiers: Sequence[Purifier]) -> Purifier:
    """Return the purifier that applies several, one after the other; a single one is returned itself."""
    if len(purifiers) == 1:
        return purifiers[0]

    def apply(images: Tensor, generators: Generators | None) -> Tensor:
        for purifier in purifiers:
            images = purifier(images, generators)
        return images

    return Purifier(
        name=SEPARATOR.join(purifier.name for purifier in purifiers),
        apply=apply,
        differentiable=all(purifier.differentiable for purifier in purifiers),
        random=any(purifier.random for purifier in purifiers),
        passes=sum(purifier.passes for purifier in purifiers),
    )
