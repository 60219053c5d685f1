"""Attacks by projected gradient ascent in a ball around the clean image: PGD and APGD.

    attacked = pgd(objective, clean, PGDConfig(epsilon=8 / 255))

They maximise any objective of the image and need no VAE.

Sources: PGD, Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018, the inner
maximisation of SRL-VAE (arXiv 2504.17219, section on adversarial training). APGD, Croce and Hein, "Reliable Evaluation
of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks", ICML 2020.
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
"""Maps images `[N,3,H,W]` in [-1,1], or clips `[N,3,T,H,W]`, to one value per image, `[N]` float32, to be maximised.

Value i may depend on image i only. It should have the size of a mean over pixels; see `value_and_gradient`.
"""

Norm = Literal["linf", "l2"]
Schedule = Literal["constant", "linear"]
LINEAR_END = 0.01
"""Share of the step size that the linear schedule ends at. Step i of N has the size s - (s - s/100) i/N, as in
PhotoGuard's code."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The images that an attack may return: a ball around the clean image, clipped to [-1,1].

    Attributes:
        epsilon: the ball's radius in units of a [0,1] image. The largest change of a value for `linf`, the Euclidean
            length of the change of the whole image for `l2`.
        norm: `linf` or `l2`.

    Raises:
        ValueError: if `epsilon` is negative or not a number, or if `norm` is unknown.
    """

    epsilon: float = 8 / 255
    norm: Norm = "linf"

    def __post_init__(self) -> None:
        if not self.epsilon >= 0:
            raise ValueError(f"epsilon must be at least 0, got {self.epsilon}")
        if self.norm not in get_args(Norm):
            raise ValueError(f"norm must be one of {', '.join(get_args(Norm))}, got '{self.norm}'")

    @property
    def radius(self) -> float:
        """The radius between images in [-1,1]."""
        return to_model_units(self.epsilon)

    def project(self, images: Tensor, clean: Tensor) -> Tensor:
        """Return images `[N,3,H,W]`, or clips `[N,3,T,H,W]`, moved into the ball around `clean` and clipped to [-1,1].

        For linf these are the nearest allowed images. For l2, images are first moved to the nearest point of the ball
        and then clipped, as in AutoAttack and foolbox.
        """
        if self.norm == "linf":
            return torch.clamp(images, clean - self.radius, clean + self.radius).clamp_(PIXEL_MIN, PIXEL_MAX)
        change = images - clean
        shrink = (self.radius / lengths(change).clamp_min(1e-12)).clamp(max=1.0)
        # Clipping moves an image towards the clean one, so it stays in the ball.
        return (clean + shrink * change).clamp_(PIXEL_MIN, PIXEL_MAX)

    def draw(self, clean: Tensor, generators: Generators | None = None) -> Tensor:
        """Draw images `[N,3,H,W]` uniformly from the ball and clip them to [-1,1]; see `draws.draw` for `generators`."""
        if self.norm == "linf":
            return self.project(clean + draw_uniform(generators, like=clean) * self.radius, clean)
        direction = self.steepest(draw_normal(generators, like=clean))
        share = draw(torch.rand, (1,) * (clean.ndim - 1), generators, like=clean) ** (1 / clean[0].numel())
        return self.project(clean + share * self.radius * direction, clean)

    def draw_border(self, clean: Tensor, generators: Generators | None = None) -> Tensor:
        """Draw images `[N,3,H,W]` on the ball's border, as APGD starts, and clip them to [-1,1]."""
        if self.norm == "linf":
            noise = draw_uniform(generators, like=clean)
            direction = noise / per_image(noise.abs().flatten(1).amax(dim=1), noise)
        else:
            direction = self.steepest(draw_normal(generators, like=clean))
        return self.project(clean + self.radius * direction, clean)

    def steepest(self, gradient: Tensor) -> Tensor:
        """Return the change of size 1 along which the objective grows fastest; 0 where the gradient is 0."""
        return gradient.sign() if self.norm == "linf" else unit_changes(gradient)


@dataclass(frozen=True, kw_only=True)
class PGDConfig(Budget):
    """Budget and steps of PGD.

    Attributes:
        step_size: size of a step, in the units of `epsilon`.
        num_steps: steps of one run.
        random_start: start from a random image of the ball; False starts from the clean image.
        num_restarts: independent runs. With more than one, each image gets its best iterate of all runs.
        keep_best: return each image's best iterate instead of the last, at the cost of one more call of the objective
            per run.
        schedule: `constant`, or `linear` for steps that shrink to a hundredth.

    Raises:
        ValueError: if the budget is invalid (see `Budget`), if `num_steps` is negative, if `num_restarts` is below 1,
            or if `schedule` is unknown.
    """

    step_size: float = 0.02
    num_steps: int = 10
    random_start: bool = True
    num_restarts: int = 1
    keep_best: bool = False
    schedule: Schedule = "constant"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_length(self.num_steps, self.num_restarts)
        if self.schedule not in get_args(Schedule):
            raise ValueError(f"schedule must be one of {', '.join(get_args(Schedule))}, got '{self.schedule}'")

    def start(self, clean: Tensor, generators: Generators | None = None) -> Tensor:
        """Return the images `[N,3,H,W]` that a run starts from; see `draws.draw` for `generators`."""
        return self.draw(clean, generators) if self.random_start else clean

    def step_at(self, step: int) -> float:
        """Return the size of step number `step`, counted from 0."""
        if self.schedule == "constant":
            return self.step_size
        return self.step_size * (1 - (1 - LINEAR_END) * step / self.num_steps)


def check_length(num_steps: int, num_restarts: int) -> None:
    """Raise a ValueError if `num_steps` is negative or `num_restarts` is below 1."""
    if num_steps < 0:
        raise ValueError(f"num_steps must be at least 0, got {num_steps}")
    if num_restarts < 1:
        raise ValueError(f"num_restarts must be at least 1, got {num_restarts}")


def pgd(objective: Objective, clean: Tensor, config: PGDConfig, *, generators: Generators | None = None) -> Tensor:
    """Return images within the budget around `clean` that make `objective` large.

    Args:
        objective: returns one value per image, to be maximised. Wrap it in `negated` to minimise.
        clean: `[N,3,H,W]` float in [-1,1].
        config: budget, steps and restarts.
        generators: one CPU generator per image for its random starts, which then do not depend on the batch. None
            draws from PyTorch's global generator. Not used without a random start.

    Returns:
        `[N,3,H,W]`, detached, in [-1,1]. With 0 steps or an epsilon of 0, `clean` itself.

    Raises:
        ValueError: if the number of generators is not the number of images.
    """
    clean = clean.detach()
    if config.num_steps == 0 or config.epsilon == 0:
        return clean
    track_best = config.keep_best or config.num_restarts > 1
    best = BestIterate(clean)
    for _ in range(config.num_restarts):
        adversarial = config.start(clean, generators)
        for step in range(config.num_steps):
            value, gradient = value_and_gradient(objective, adversarial)
            if track_best:
                best.update(adversarial, value)
            ascended = adversarial + to_model_units(config.step_at(step)) * config.steepest(gradient)
            adversarial = config.project(ascended, clean)
        if track_best:
            with torch.no_grad():
                best.update(adversarial, objective(adversarial))
    return best.images if track_best else adversarial


def value_and_gradient(objective: Objective, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the objective `[N]` and its scaled gradient `[N,3,H,W]` with respect to the images.

    The gradient is multiplied by the number of values in an image. A mean over pixels has gradients near 1e-7, which
    half precision rounds to 0. Attacks use the gradient's sign or direction, which the factor does not change.
    No parameter's `.grad` is changed.
    """
    with torch.enable_grad():
        images = images.detach().requires_grad_(True)
        value = objective(images)
        (gradient,) = torch.autograd.grad(value.sum() * images[0].numel(), images)
    return value.detach(), gradient


def expected(objective: Objective, draws: int) -> Objective:
    """Return the mean of several calls of an objective that draws: expectation over transformation (Athalye et al., ICML 2018).

    Each call's graph is freed before the next one, so that the mean takes no more memory than one call.
    """

    def mean(images: Tensor) -> Tensor:
        if not images.requires_grad:
            return torch.stack([objective(images) for _ in range(draws)]).mean(dim=0)
        pairs = [value_and_gradient(objective, images) for _ in range(draws)]
        value, gradient = (torch.stack(each).mean(dim=0) for each in zip(*pairs, strict=True))
        # 0, with the gradient of the mean
        change = ((images - images.detach()) * gradient).flatten(1).sum(dim=1) / images[0].numel()
        return value + change

    return objective if draws == 1 else mean


def negated(objective: Objective) -> Objective:
    """Return the objective with its sign flipped, for an attack that minimises it."""
    return lambda images: -objective(images)


def lengths(changes: Tensor) -> Tensor:
    """Return the Euclidean length of each image's change `[N,...]`, as `[N,1,...]`."""
    return per_image(changes.flatten(1).norm(dim=1), changes)


def unit_changes(changes: Tensor) -> Tensor:
    """Return the changes `[N,...]`, each scaled to a Euclidean length of 1; 0 stays 0."""
    return changes / lengths(changes).clamp_min(1e-30)


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """Return one value per image, `[N]`, in as many dimensions as `like` `[N,...]`."""
    return values.view(-1, *[1] * (like.ndim - 1))


class BestIterate:
    """Keeps, for each image of a batch, the iterate with the highest objective so far.

    Attributes:
        images: the best iterates, `[N,3,H,W]`; at first, the clean images.
        values: their objective, `[N]`; at first, minus infinity.
    """

    def __init__(self, clean: Tensor) -> None:
        self.images = clean.clone()
        self.values = torch.full((len(clean),), -torch.inf, device=clean.device)

    def update(self, images: Tensor, values: Tensor) -> Tensor:
        """Keep the images that are better than the best so far; return which, `[N,1,...]` bool."""
        better = values.float() > self.values
        self.values = torch.where(better, values.float(), self.values)
        better = per_image(better, images)
        self.images = torch.where(better, images, self.images)
        return better


@dataclass(frozen=True, kw_only=True)
class APGDConfig(Budget):
    """Budget and length of APGD, which chooses its step sizes itself.

    Attributes:
        num_steps: steps of one run.
        num_restarts: independent runs; each image gets its best iterate of all runs.

    Raises:
        ValueError: if the budget is invalid (see `Budget`), if `num_steps` is negative, or if `num_restarts` is below 1.
    """

    num_steps: int = 100
    num_restarts: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_length(self.num_steps, self.num_restarts)


MOMENTUM = 0.75  # APGD's share of the new direction
PROGRESS_NEEDED = 0.75  # APGD keeps a step size if more than this share of the steps raised the objective


def apgd(objective: Objective, clean: Tensor, config: APGDConfig, *, generators: Generators | None = None) -> Tensor:
    """Return images within the budget around `clean` that make `objective` large, found by Auto-PGD.

    A run starts from a random image on the ball's border with steps of 2 epsilon, and halves an image's step when it
    stalls (Croce and Hein, ICML 2020, Algorithm 1). Each image gets its best iterate. A run takes `num_steps` + 1
    gradients. Arguments, result and errors are those of `pgd`.

    The paper and its authors' code (AutoAttack) differ in three details: the checkpoints, exactly 75% of rises, and
    the value that the first step after a halving must exceed. This function follows the code.
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
    step = torch.full_like(per_image(clean.flatten(1)[:, 0], clean), 2 * config.radius)
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
            halve = per_image(stall.check(best.values), clean)
            step = torch.where(halve, step / 2, step)
            current = torch.where(halve, best.images, current)
            gradient = torch.where(halve, best_gradient, gradient)
    return best


def apgd_checkpoints(num_steps: int) -> list[int]:
    """Return the numbers of steps after which APGD may halve a step size.

    The first gap is 22% of the steps; each next gap is 3% shorter, down to 6%. Each share is rounded down to whole
    steps and is at least 1, as in AutoAttack. The paper rounds the sums up; for 100 steps both agree.
    """
    gap, least, shrink = (max(int(share * num_steps), 1) for share in (0.22, 0.06, 0.03))
    checkpoints, at = [], 0
    while at + gap <= num_steps:
        at += gap
        checkpoints.append(at)
        gap = max(gap - shrink, least)
    return checkpoints


class Stall:
    """Decides for each image of a batch whether APGD halves its step at a checkpoint."""

    def __init__(self, number: int, device: torch.device) -> None:
        self.rises = torch.zeros(number, device=device)
        self.steps = 0
        self.best_before = torch.full((number,), -torch.inf, device=device)
        self.halved_before = torch.ones(number, dtype=torch.bool, device=device)

    def count(self, rose: Tensor) -> None:
        """Count a step; `rose` `[N]` tells which images it gave a higher objective."""
        self.rises += rose
        self.steps += 1

    def check(self, best: Tensor) -> Tensor:
        """Return which images need shorter steps, `[N]` bool, and begin to count anew.

        An image needs them if too few steps raised its objective, or if its best value `best` `[N]` did not improve
        since the last checkpoint, which kept the step.
        """
        oscillates = self.rises <= PROGRESS_NEEDED * self.steps
        unchanged = ~self.halved_before & (best <= self.best_before)
        halve = oscillates | unchanged
        self.rises.zero_()
        self.steps, self.best_before, self.halved_before = 0, best.clone(), halve
        return halve
