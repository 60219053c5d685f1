"""Objectives for attacks, two that look over an attack's shoulder, and a perceptual distance without weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from srl_utils.attacks.gradient import Objective
from srl_utils.metrics.losses import FeatureDistance, ReconstructionLoss
from srl_utils.vae.networks import LatentDecoder, LatentEncoder, split_moments

# clean +- radius rounds once near 1, and the difference that a test takes once more: 2^-23 at most.
ROUNDING = 1.2e-7


def wavy(images: Tensor) -> Tensor:
    """An objective with many maxima in the ball; image i alone decides on value i."""
    return torch.sin(35 * images + 1).flatten(1).sum(dim=1)


def flat(images: Tensor) -> Tensor:
    """An objective with gradient 0: what an attack returns is its start."""
    return (0 * images).flatten(1).sum(dim=1)


def linear(weights: Tensor) -> Objective:
    return lambda images: (weights * images).flatten(1).sum(dim=1)


def reconstruction_objective(vae, clean: Tensor, loss: ReconstructionLoss | None = None) -> Objective:
    """The training's inner objective, on the posterior mean."""
    loss = loss or ReconstructionLoss()
    encoder, decoder, target = LatentEncoder(vae), LatentDecoder(vae), loss.target(clean)
    return lambda images: loss(decoder(split_moments(encoder(images)).mean), target)


class Recorded:
    """An objective that keeps what it was asked and what it answered."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.seen: list[Tensor] = []
        self.values: list[Tensor] = []

    def __call__(self, images: Tensor) -> Tensor:
        values = self.objective(images)
        self.seen.append(images.detach().clone())
        self.values.append(values.detach())
        return values


class Scripted(Recorded):
    """At call number k every image has the value `values[k]` and the gradient `gradients[k]`, whatever it shows."""

    def __init__(self, values: Sequence[float], gradients: Sequence[Tensor | float]) -> None:
        super().__init__(self.answer)
        self.script = list(zip(values, gradients, strict=True))

    def answer(self, images: Tensor) -> Tensor:
        value, gradient = self.script[len(self.seen)]
        return value + (gradient * (images - images.detach())).flatten(1).sum(dim=1)


def euclidean(changes: Tensor) -> Tensor:
    """Length of each image's change, `[N]`, in float64."""
    return changes.double().flatten(1).square().sum(dim=1).sqrt()


class Pixels(nn.Module):
    """Features that are the pixels themselves."""

    def forward(self, images: Tensor) -> list[Tensor]:
        return [images]


def pixel_distance() -> FeatureDistance:
    """What takes the place of LPIPS in a test."""
    return FeatureDistance(Pixels(), "pixels")
