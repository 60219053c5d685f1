"""BlurGuard: attacks whose perturbation is blurred until the image's frequencies look like those of the clean one.

Source: Kim et al., "BlurGuard: A Simple Approach for Robustifying Image Protection Against AI-Powered Editing" (arXiv
2511.00143), jsu-kim/BlurGuard, BlurGuard/code/attacks.py and BlurGuard/configs/attack/base.yaml.

The authors fit a blur for each region that Segment Anything finds. Here the whole image is one region.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from srl_utils.attacks.draws import Generators, draw_normal
from srl_utils.attacks.gradient import (
    LINEAR_END,
    Budget,
    Objective,
    check_length,
    unit_changes,
    value_and_gradient,
)
from srl_utils.images.pixels import to_model_units, to_unit_range

BLUR_REACH = 16  # pixels on each side of the kernel's centre
FITTING_STEPS = 50
FITTING_RATE = 0.06  # Adam's, on the logarithm of sigma
NO_POWER = 1e-8  # keeps logarithms finite


@dataclass(frozen=True, kw_only=True)
class BlurGuardConfig(Budget):
    """Budget and steps of BlurGuard. Any protection takes it in place of its own `config`, unless its loss is flat at the
    clean image, as PID's is.

    Attributes:
        step_size: Euclidean length of the first step of the whole image, before the blur, in units of a [0,1] image.
        num_steps: steps of the attack, which follow the `FITTING_STEPS` that choose the blur.

    Raises:
        ValueError: if the budget is invalid (see `Budget`), or if `num_steps` is negative.
    """

    epsilon: float = 16 / 255
    step_size: float = 1.0
    num_steps: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        check_length(self.num_steps, num_restarts=1)

    def step_at(self, step: int) -> float:
        """Return the size of step number `step`, counted from 0. Sizes shrink while the blur is chosen, too."""
        share = (FITTING_STEPS + step) / (FITTING_STEPS + self.num_steps)
        return self.step_size * (1 - (1 - LINEAR_END) * share)


def blurred_attack(
    objective: Objective, clean: Tensor, config: BlurGuardConfig, *, generators: Generators | None = None
) -> Tensor:
    """Return images within the budget around `clean` that make `objective` large by a change that is blurred and clipped.

    The change before the blur starts at 0 and is not bounded. Arguments, result and errors are those of `pgd`.
    """
    if config.num_steps == 0 or config.epsilon == 0:
        return clean
    sigma = fitted_sigma(clean, config, generators)

    def shown(change: Tensor) -> Tensor:
        return config.project(clean + blurred(change, sigma), clean)

    change = torch.zeros_like(clean)
    for step in range(config.num_steps):
        _, gradient = value_and_gradient(lambda trial: objective(shown(trial)), change)
        change = change + to_model_units(config.step_at(step)) * unit_changes(gradient)
    return shown(change)


def fitted_sigma(clean: Tensor, budget: Budget, generators: Generators | None = None) -> Tensor:
    """Return each image's standard deviation of the blur, `[N]` pixels, that brings noise closest to its spectrum.

    Adam lowers the spectral gap between an image and the same with blurred white noise, drawn anew in each step, starting
    from 1 pixel.
    """
    spectrum = ring_spectrum(clean)

    def gap(log_sigma: Tensor) -> Tensor:
        noise = draw_normal(generators, like=clean).clamp(-budget.radius, budget.radius)
        noised = budget.project(clean + blurred(noise, log_sigma.exp()), clean)
        return (ring_spectrum(noised) / spectrum).log10().abs().amax(dim=1)

    log_sigma = torch.zeros(len(clean), device=clean.device)
    optimizer = torch.optim.Adam([log_sigma], lr=FITTING_RATE)
    for _ in range(FITTING_STEPS):
        _, log_sigma.grad = value_and_gradient(gap, log_sigma)
        optimizer.step()
    return log_sigma.exp()


def blurred(changes: Tensor, sigma: Tensor) -> Tensor:
    """Convolve images `[N,C,H,W]`, or the frames of clips, with Gaussians of `sigma` `[N]` pixels; borders are mirrored."""
    planes = changes.flatten(1, -3)
    count = planes.shape[1]
    for axis in (2, 3):
        reach = min(BLUR_REACH, planes.shape[axis] - 1)  # a mirror shows no more
        offsets = torch.arange(-reach, reach + 1, device=changes.device)
        kernel = torch.softmax(-((offsets / sigma[:, None]).square()) / 2, dim=1).repeat_interleave(count, dim=0)
        rows = planes.movedim(axis, -1)
        mirrored = functional.pad(rows.flatten(1, 2), (reach, reach), mode="reflect")
        lines = mirrored.view(1, len(kernel), -1, mirrored.shape[-1])
        spread = functional.conv2d(lines, kernel[:, None, None].to(lines), groups=len(kernel))
        planes = spread.view(rows.shape).movedim(-1, axis)
    return planes.reshape(changes.shape)


def ring_spectrum(images: Tensor) -> Tensor:
    """Return the power of the frequencies of images in [-1,1], or of clips, summed over rings and channels, `[N,R]`.

    As in the authors' code, rings surround the highest frequency, which an unshifted Fourier transform has in the middle.
    """
    height, width = images.shape[-2:]
    power = torch.fft.fft2(to_unit_range(images)).abs().square().flatten(1, -3).sum(dim=1)
    down, across = (torch.arange(side, device=images.device) - (side - 1) / 2 for side in (height, width))
    rings = torch.hypot(down[:, None], across).round().long().flatten()
    sums = power.new_zeros(len(images), int(rings.max()) + 1)
    return sums.index_add(1, rings, power.flatten(1)) + NO_POWER
