"""Purifiers that use an autoencoder: a pass through it, and IMPRESS."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from srl_utils.attacks.draws import Generators, draw_normal
from srl_utils.images.pixels import PIXEL_MAX, PIXEL_MIN
from srl_utils.metrics.losses import ImageDistance, mean_squared_error
from srl_utils.purifiers.base import Autoencoder, Purifier


@dataclass(frozen=True, kw_only=True)
class ImpressConfig:
    """Settings of IMPRESS; images are in [-1,1].

    Attributes:
        num_steps: of Adam, whose learning rate follows a cosine down to 0.
        learning_rate: of the first step.
        weight: of the hinge on the perceptual distance.
        noise: standard deviation of the noise in the start.
        allowed: perceptual distance from the given image that costs nothing.
    """

    num_steps: int
    learning_rate: float
    weight: float
    noise: float
    allowed: float = 0.1


IMPRESS = {
    "impress": ImpressConfig(num_steps=1000, learning_rate=0.005, weight=0.01, noise=0.05),
    "impress-glaze": ImpressConfig(num_steps=3000, learning_rate=0.01, weight=0.1, noise=0.1),
}
"""The settings of the authors' code, against PhotoGuard and against Glaze."""


def vae_loop(vae: Autoencoder, name: str) -> Purifier:
    """Return a pass through an autoencoder: encode to the posterior's mean, and decode."""
    return Purifier(
        name=name, apply=lambda images, _: vae.reconstruct(images.to(vae.device)).to(images.device), passes=1.0
    )


def impress(vae: Autoencoder, perceptual: ImageDistance, config: ImpressConfig, name: str) -> Purifier:
    """Return IMPRESS, which looks for an image near the given one that the autoencoder reconstructs well.

    Source: Cao et al., "IMPRESS: Evaluating the Resilience of Imperceptible Perturbations Against Unauthorized Data Usage
    in Diffusion-Based Generative AI", NeurIPS 2023, and the authors' code. Reconstructions are of the posterior's mean.

    Args:
        vae: the autoencoder; its weights should be frozen, which saves time.
        perceptual: on the same device; the authors' is LPIPS on VGG.
        config: see `IMPRESS`.
        name: of the purifier.
    """

    def apply(images: Tensor, generators: Generators | None) -> Tensor:
        with torch.enable_grad():
            return consistent(images.to(vae.device), generators, vae, perceptual, config).to(images.device)

    return Purifier(name=name, apply=apply, differentiable=False, random=True, passes=2.0 * config.num_steps)


def consistent(
    images: Tensor, generators: Generators | None, vae: Autoencoder, perceptual: ImageDistance, config: ImpressConfig
) -> Tensor:
    """Return images near `images` `[N,3,H,W]` that the autoencoder reconstructs well: the minimum of IMPRESS's loss."""
    given = perceptual.features(images)
    start = images + config.noise * draw_normal(generators, like=images)
    found = start.clamp(PIXEL_MIN, PIXEL_MAX).requires_grad_()
    optimizer = torch.optim.Adam([found], lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.num_steps)
    for _ in range(config.num_steps):
        excess = (perceptual.distance(found, given) - config.allowed).clamp_min(0)
        loss = mean_squared_error(vae.reconstruct(found), found) + config.weight * excess
        # A sum, so that no image changes another one's step; `backward` would also reach weights that are not frozen.
        (found.grad,) = torch.autograd.grad(loss.sum(), found)
        optimizer.step()
        schedule.step()
    return found.detach()
