"""Projected gradient ascent in a ball around the clean image, over any objective; knows no VAE.

Sources: PGD, Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018, which is the
inner maximisation of SRL-VAE (arXiv 2504.17219, section on adversarial training); its momentum, Dong et al., "Boosting
Adversarial Attacks with Momentum", CVPR 2018; APGD, Croce and Hein, "Reliable Evaluation of Adversarial Robustness with
an Ensemble of Diverse Parameter-free Attacks", ICML 2020.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from srl_utils.attacks.draws import Generators, draw, draw_normal, draw_uniform
from srl_utils.images.pixels import PIXEL_MAX, PIXEL_MIN, to_model_units

Objective = Callable[[Tensor], Tensor]
"""Images `[N,3,H,W]` in [-1,1] to one value per image, `[N]` float32, to be maximised.

Value i may depend on image i only. It should be of the size of a mean over pixels: see `value_and_gradient`.
"""

Norm = Literal["linf", "l2"]
Schedule = Literal["constant", "linear"]
LINEAR_END = 0.01
"""What the linear schedule leaves of the step, as in PhotoGuard's code: s - (s - s/100) i/N at step i of N."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The images that an attack may show: a ball around the clean image, within [-1,1].

    `epsilon` is in units of a [0,1] image: the largest change of a value (linf), or the Euclidean length of the
    change of the whole image (l2).

    Raises:
        ValueError: for a negative epsilon or a norm that is neither.
    """

    epsilon: float = 8 / 255
    norm: Norm = "linf"

    def __post_init__(self) -> None:
        if not self.epsilon >= 0 or self.norm not in get_args(Norm):
            raise ValueError(f"no ball has a radius of {self.epsilon} in the norm '{self.norm}'")

    @property
    def radius(self) -> float:
        return to_model_units(self.epsilon)

    def project(self, images: Tensor, clean: Tensor) -> Tensor:
        """Images `[N,3,H,W]` brought into the ball and into [-1,1].

        For linf the nearest images there are; for l2 those nearest in the ball and then clipped, which near the
        range's border stay short of it, as in AutoAttack and foolbox.
        """
        if self.norm == "linf":
            return torch.clamp(images, clean - self.radius, clean + self.radius).clamp_(PIXEL_MIN, PIXEL_MAX)
        change = images - clean
        shrink = (self.radius / lengths(change).clamp_min(1e-12)).clamp(max=1.0)
        # Clipping to the range moves towards the clean image, and so not out of the ball.
        return (clean + shrink * change).clamp_(PIXEL_MIN, PIXEL_MAX)

    def draw(self, clean: Tensor, generators: Generators | None) -> Tensor:
        """Images drawn uniformly from the ball and clipped to [-1,1]; row i is drawn from `generators[i]`."""
        if self.norm == "linf":
            return self.project(clean + draw_uniform(generators, like=clean) * self.radius, clean)
        direction = self.steepest(draw_normal(generators, like=clean))
        share = draw(torch.rand, (1, 1, 1), generators, like=clean) ** (1 / clean[0].numel())
        return self.project(clean + share * self.radius * direction, clean)

    def draw_border(self, clean: Tensor, generators: Generators | None) -> Tensor:
        """Noise scaled until it touches the ball's border (APGD's start), clipped to [-1,1]."""
        if self.norm == "linf":
            noise = draw_uniform(generators, like=clean)
            direction = noise / noise.abs().amax(dim=(1, 2, 3), keepdim=True)
        else:
            direction = self.steepest(draw_normal(generators, like=clean))
        return self.project(clean + self.radius * direction, clean)

    def steepest(self, gradient: Tensor) -> Tensor:
        """The change of unit size along which the objective grows fastest; 0 where the gradient is."""
        return gradient.sign() if self.norm == "linf" else gradient / lengths(gradient).clamp_min(1e-30)


@dataclass(frozen=True, kw_only=True)
class PGDConfig(Budget):
    """Budget and steps of the attack; `step_size` is in the units of `epsilon`.

    Raises:
        ValueError: for an impossible budget, fewer than 0 steps or 1 restart, or an unknown schedule.
    """

    step_size: float = 0.02
    num_steps: int = 10
    random_start: bool = True
    num_restarts: int = 1
    """Independent runs; with more than one the best image of all of them is kept, for every sample."""
    keep_best: bool = False
    """Return the best iterate rather than the last; costs one more evaluation of the objective per run."""
    momentum: float = 0.0
    """Share of the former direction that is kept, as in MI-FGSM; 0 is plain PGD."""
    schedule: Schedule = "constant"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_length(self.num_steps, self.num_restarts)
        if self.schedule not in get_args(Schedule):
            raise ValueError(f"'{self.schedule}' is none of the schedules {', '.join(get_args(Schedule))}")

    def start(self, clean: Tensor, generators: Generators | None) -> Tensor:
        return self.draw(clean, generators) if self.random_start else clean

    def step_at(self, step: int) -> float:
        """The size of step number `step`, the first being 0."""
        if self.schedule == "constant":
            return self.step_size
        return self.step_size * (1 - (1 - LINEAR_END) * step / self.num_steps)


def check_length(num_steps: int, num_restarts: int) -> None:
    """Raises ValueError for fewer than 0 steps or 1 restart."""
    if num_restarts < 1 or num_steps < 0:
        raise ValueError(f"{num_restarts} restarts of {num_steps} steps make no attack")


def pgd(objective: Objective, clean: Tensor, config: PGDConfig, *, generators: Generators | None = None) -> Tensor:
    """Images within the budget around `clean` that make `objective` large.

    Args:
        objective: value per image, to be maximised (`negated` for one to be minimised).
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
    track_best = config.keep_best or config.num_restarts > 1
    best = BestIterate(clean)
    for _ in range(config.num_restarts):
        adversarial = config.start(clean, generators)
        velocity = torch.zeros_like(clean)
        for step in range(config.num_steps):
            value, gradient = value_and_gradient(objective, adversarial)
            if track_best:
                best.update(adversarial, value)
            velocity = accumulate(velocity, gradient, config.momentum)
            ascended = adversarial + to_model_units(config.step_at(step)) * config.steepest(velocity)
            adversarial = config.project(ascended, clean)
        if track_best:
            with torch.no_grad():
                best.update(adversarial, objective(adversarial))
    return best.images if track_best else adversarial


def value_and_gradient(objective: Objective, images: Tensor) -> tuple[Tensor, Tensor]:
    """The objective `[N]` and its gradient `[N,3,H,W]` with respect to the images alone.

    `torch.autograd.grad` leaves every parameter's `.grad` as it was. The sum is scaled by the number of
    values in an image, because an objective that is a mean over pixels has gradients near 1e-7, which half
    precision rounds to 0; the sign or the direction that the attack takes does not see the scale.
    """
    with torch.enable_grad():
        images = images.detach().requires_grad_(True)
        value = objective(images)
        (gradient,) = torch.autograd.grad(value.sum() * images[0].numel(), images)
    return value.detach(), gradient


def accumulate(velocity: Tensor, gradient: Tensor, momentum: float) -> Tensor:
    """MI-FGSM's direction `[N,3,H,W]`: gradients scaled to a mean absolute value of 1, summed, the older weighing less."""
    if momentum == 0:
        return gradient
    size = gradient.abs().mean(dim=(1, 2, 3), keepdim=True).clamp_min(1e-30)
    return momentum * velocity + gradient / size


def negated(objective: Objective) -> Objective:
    """For attacks that minimise."""
    return lambda images: -objective(images)


def lengths(changes: Tensor) -> Tensor:
    """Euclidean length of each image's change, `[N,1,1,1]`."""
    return changes.flatten(1).norm(dim=1)[:, None, None, None]


class BestIterate:
    """For every image the one with the highest objective seen so far."""

    def __init__(self, clean: Tensor) -> None:
        self.images = clean.clone()
        self.values = torch.full((len(clean),), -torch.inf, device=clean.device)

    def update(self, images: Tensor, values: Tensor) -> Tensor:
        """Takes over what is better; returns where it was, `[N,1,1,1]` bool."""
        better = values.float() > self.values
        self.values = torch.where(better, values.float(), self.values)
        better = better[:, None, None, None]
        self.images = torch.where(better, images, self.images)
        return better


@dataclass(frozen=True, kw_only=True)
class APGDConfig(Budget):
    """Budget and length of APGD, which chooses its steps by itself; refuses what `PGDConfig` refuses."""

    num_steps: int = 100
    num_restarts: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_length(self.num_steps, self.num_restarts)


MOMENTUM = 0.75  # of APGD: share of the new direction
PROGRESS_NEEDED = 0.75  # a step size is kept where more than this share of a window's steps raised the objective


def apgd(objective: Objective, clean: Tensor, config: APGDConfig, *, generators: Generators | None) -> Tensor:
    """Auto-PGD (Croce and Hein, ICML 2020, Algorithm 1): steps of 2 epsilon, halved for an image when it stalls.

    Arguments, result and errors are those of `pgd`; the start is always random, and the best iterate of all
    restarts is returned. A restart takes `num_steps` + 1 gradients. Where the paper and its authors' code (AutoAttack)
    differ (the checkpoints, exactly 75% of rises, the value above which the first step after a halving is a rise), this
    follows the code.
    """
    clean = clean.detach()
    if config.num_steps == 0 or config.epsilon == 0:
        return clean
    overall = BestIterate(clean)
    for _ in range(config.num_restarts):
        run = _apgd_run(objective, clean, config, generators)
        overall.update(run.images, run.values)
    return overall.images


def _apgd_run(objective: Objective, clean: Tensor, config: APGDConfig, generators: Generators | None) -> BestIterate:
    current = previous = config.draw_border(clean, generators)
    best, best_gradient = BestIterate(clean), torch.zeros_like(clean)
    step = torch.full((len(clean), 1, 1, 1), 2 * config.radius, device=clean.device)
    stall = Stall(len(clean), clean.device)
    checkpoints = apgd_checkpoints(config.num_steps)
    value, gradient = value_and_gradient(objective, current)
    best_gradient = torch.where(best.update(current, value), gradient, best_gradient)
    for number in range(config.num_steps):
        ascended = config.project(current + step * config.steepest(gradient), clean)
        share = 1.0 if number == 0 else MOMENTUM
        moved = current + share * (ascended - current) + (1 - share) * (current - previous)
        previous, current = current, config.project(moved, clean)
        former_value = value
        value, gradient = value_and_gradient(objective, current)
        best_gradient = torch.where(best.update(current, value), gradient, best_gradient)
        stall.count(value > former_value)
        if number + 1 in checkpoints:
            halve = stall.check(best.values)[:, None, None, None]
            step = torch.where(halve, step / 2, step)
            current = torch.where(halve, best.images, current)
            gradient = torch.where(halve, best_gradient, gradient)
    return best


def apgd_checkpoints(num_steps: int) -> list[int]:
    """After how many steps the step size is looked at: gaps of 22% of the steps, shrinking by 3% to 6%.

    Each share is rounded down to whole steps, and at least 1, as in AutoAttack; the paper rounds the sums up instead,
    which for 100 steps is the same.
    """
    gap, least, shrink = (max(int(share * num_steps), 1) for share in (0.22, 0.06, 0.03))
    checkpoints, at = [], 0
    while at + gap <= num_steps:
        at += gap
        checkpoints.append(at)
        gap = max(gap - shrink, least)
    return checkpoints


class Stall:
    """For each image, whether its steps have become too long since the last checkpoint."""

    def __init__(self, number: int, device: torch.device) -> None:
        self.rises = torch.zeros(number, device=device)
        self.steps = 0
        self.best_before = torch.full((number,), -torch.inf, device=device)
        self.halved_before = torch.ones(number, dtype=torch.bool, device=device)

    def count(self, rose: Tensor) -> None:
        self.rises += rose
        self.steps += 1

    def check(self, best: Tensor) -> Tensor:
        """`[N]` bool: too few steps that rose, or no better value than before although the step was kept."""
        oscillates = self.rises <= PROGRESS_NEEDED * self.steps
        unchanged = ~self.halved_before & (best <= self.best_before)
        halve = oscillates | unchanged
        self.rises.zero_()
        self.steps, self.best_before, self.halved_before = 0, best.clone(), halve
        return halve
