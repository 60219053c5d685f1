"""Projected gradient ascent in the L-infinity ball, over any objective; knows no VAE.

Source: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018; as the inner
maximisation of SRL-VAE: arXiv 2504.17219, section on adversarial training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from srl_utils.images import PIXEL_MAX, PIXEL_MIN, to_model_units

Objective = Callable[[Tensor], Tensor]
"""Images `[N,3,H,W]` in [-1,1] to one value per image, `[N]` float32, to be maximised.

Value i may depend on image i only. It should be of the size of a mean over pixels: see `value_and_gradient`.
"""


@dataclass(frozen=True, kw_only=True)
class PGDConfig:
    """The attack's knobs; `epsilon` and `step_size` in units of a [0,1] image."""

    epsilon: float = 8 / 255
    step_size: float = 0.02
    num_steps: int = 10
    random_start: bool = True
    num_restarts: int = 1
    """Independent runs; with more than one the best image of all of them is kept, for every sample."""
    keep_best: bool = False
    """Return the best iterate rather than the last; costs one more evaluation of the objective per run."""

    def __post_init__(self) -> None:
        if self.num_restarts < 1 or self.num_steps < 0:
            raise ValueError(f"{self.num_restarts} restarts of {self.num_steps} steps make no attack")


def pgd(
    objective: Objective,
    clean: Tensor,
    config: PGDConfig,
    *,
    generators: Sequence[torch.Generator] | None = None,
) -> Tensor:
    """Images within `config.epsilon` of `clean` that make `objective` large.

    Args:
        objective: value per image, to be maximised.
        clean: `[N,3,H,W]` float in [-1,1].
        config: budget, step, number of steps and restarts.
        generators: one CPU generator per image for its random starts, so that an image's start does not
            depend on the batch it stands in; needed where `config.random_start`.

    Returns:
        `[N,3,H,W]`, detached, in [-1,1]. With 0 steps or an epsilon of 0, `clean` itself.

    Raises:
        ValueError: if a random start is asked for without one generator per image.
    """
    clean = clean.detach()
    if config.num_steps == 0 or config.epsilon == 0:
        return clean
    if config.random_start and (generators is None or len(generators) != len(clean)):
        raise ValueError("a random start needs one generator per image")
    track_best = config.keep_best or config.num_restarts > 1
    best = BestIterate(clean)
    for _ in range(config.num_restarts):
        adversarial = _start(clean, config, generators)
        for _ in range(config.num_steps):
            value, gradient = value_and_gradient(objective, adversarial)
            if track_best:
                best.update(adversarial, value)
            ascended = adversarial + to_model_units(config.step_size) * gradient.sign()
            adversarial = project_linf(ascended, clean, config.epsilon)
        if track_best:
            with torch.no_grad():
                best.update(adversarial, objective(adversarial))
    return best.images if track_best else adversarial


def project_linf(images: Tensor, clean: Tensor, epsilon: float) -> Tensor:
    """The nearest images within `epsilon` (units of a [0,1] image) of `clean` and within [-1,1]."""
    radius = to_model_units(epsilon)
    return torch.clamp(images, clean - radius, clean + radius).clamp_(PIXEL_MIN, PIXEL_MAX)


def value_and_gradient(objective: Objective, images: Tensor) -> tuple[Tensor, Tensor]:
    """The objective `[N]` and its gradient `[N,3,H,W]` with respect to the images alone.

    `torch.autograd.grad` leaves every parameter's `.grad` as it was. The sum is scaled by the number of
    values in an image, because an objective that is a mean over pixels has gradients near 1e-7, which half
    precision rounds to 0; the sign that the attack takes does not see the scale.
    """
    with torch.enable_grad():
        images = images.detach().requires_grad_(True)
        value = objective(images)
        (gradient,) = torch.autograd.grad(value.sum() * images[0].numel(), images)
    return value.detach(), gradient


def uniform_noise(like: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Noise in [-1,1] of the shape of `like`; row i is drawn on the CPU from `generators[i]`."""
    rows = [torch.rand(like.shape[1:], generator=generator) for generator in generators]
    return torch.stack(rows).mul_(2).sub_(1).to(like)


class BestIterate:
    """For every image the one with the highest objective seen so far."""

    def __init__(self, clean: Tensor) -> None:
        self.images = clean.clone()
        self.values = torch.full((len(clean),), -torch.inf, device=clean.device)

    def update(self, images: Tensor, values: Tensor) -> None:
        better = values.float() > self.values
        self.values = torch.where(better, values.float(), self.values)
        self.images = torch.where(better[:, None, None, None], images, self.images)


def _start(clean: Tensor, config: PGDConfig, generators: Sequence[torch.Generator] | None) -> Tensor:
    if not config.random_start:
        return clean
    noise = uniform_noise(clean, generators) * to_model_units(config.epsilon)
    return project_linf(clean + noise, clean, config.epsilon)
