"""Is this robustness real? Checks that find attacks that are too weak, so that no VAE seems robust because of them.

Sources: Carlini et al., "On Evaluating Adversarial Robustness", 2019 (arXiv 1902.06705), whose checklist this follows;
Athalye et al., "Obfuscated Gradients Give a False Sense of Security", ICML 2018.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from srl_utils.attacks.draws import Generators, draw_signs, image_generators
from srl_utils.attacks.gradient import APGDConfig, Budget, Objective, apgd, pgd, value_and_gradient
from srl_utils.attacks.random_search import SquareConfig, square_attack
from srl_utils.console import progress_bar
from srl_utils.evaluation.metering import Meter
from srl_utils.evaluation.perturbations import settling_pgd
from srl_utils.images.pixels import PIXEL_RANGE, format_pixel_distance
from srl_utils.metrics.losses import mean_squared_error
from srl_utils.metrics.pixels import MAX_PSNR
from srl_utils.vae.codec import Codec
from srl_utils.vae.networks import frozen

TOLERANCE = 0.98
"""Share of the other attack's damage that an equally strong one must reach; both depend on random starts."""
APGD_TOLERANCE = 0.9
"""The same for APGD, whose step sizes are made for a hundred steps: with few steps it may be slightly weaker."""
MAX_ZERO_GRADIENTS = 0.05
"""Share of gradient values that may be 0."""
HUGE_EPSILON = 128 / 255
"""A budget, in units of a [0,1] image, at which an attack can erase the image."""


@dataclass(frozen=True)
class Check:
    """One property that a real attack has, whether it holds, and the numbers that show it."""

    question: str
    passed: bool
    figures: str


@dataclass(frozen=True, kw_only=True)
class CheckSettings:
    """Settings of the robustness checks."""

    epsilon: float
    """Budget of the attacks in units of a [0,1] image."""
    steps: tuple[int, int, int] = (10, 50, 200)
    """Three numbers of attack steps, ascending."""
    queries: int = 500
    """Queries of the gradient-free attack."""

    @property
    def name(self) -> str:
        """Return steps and queries as part of a file name."""
        return "-".join(str(number) for number in (*self.steps, self.queries))

    @property
    def passes(self) -> tuple[int, ...]:
        """Return the estimated cost of each check for one image, in passes through encoder and decoder."""
        few, some, many = self.steps
        return (2 * (few + some + many), 6 * few, 6 * some, 1, 2 * some, 2 * some, self.queries, 2, 2 * some)


def check_robustness(
    codec: Codec, baseline: Codec, images: Tensor, settings: CheckSettings, *, seed: int
) -> list[Check]:
    """Run nine checks of one VAE's robustness on a few images.

    Args:
        codec: the VAE whose robustness is claimed.
        baseline: transferred attacks are made on it.
        images: `[n,3,H,W]` in [-1,1], attacked as one batch.
        settings: budget, steps and queries of the attacks.
        seed: fixes the attacks' starts.
    """
    clean = images.to(codec.device)
    title, costs, found = f"checks of {codec.name}", [len(images) * passes for passes in settings.passes], []
    with (
        progress_bar(sum(costs), desc=title, unit="pass") as bar,
        frozen(codec.encoder),
        frozen(baseline.encoder),
    ):
        meter = Meter(bar)
        judged, reference = (_Trial(meter.watched(each), clean, settings.epsilon, seed) for each in (codec, baseline))
        checks = _checks(judged, reference, settings)
        for number, cost in enumerate(costs, start=1):
            with meter.stage(f"{title}: {number} of {len(costs)}", cost):
                found.append(next(checks))
    return found


def _checks(trial: _Trial, on_baseline: _Trial, settings: CheckSettings) -> Iterator[Check]:
    """Yield the checks in the order of `CheckSettings.passes`; each does its work when it is asked for."""
    few, some, many = settings.steps
    by_steps = {steps: trial.pgd(steps) for steps in settings.steps}
    yield _never_falls("More steps never weaken the attack", {f"{n} steps": by_steps[n] for n in settings.steps})
    yield _never_falls(
        "Restarts never weaken the attack", {"1 start": by_steps[few], "3 starts": trial.pgd(few, restarts=3)}
    )
    sizes = (trial.epsilon / 4, trial.epsilon / 2, trial.epsilon, 2 * trial.epsilon)
    yield _never_falls(
        "A larger epsilon is never less harmful",
        {format_pixel_distance(e): by_steps[some] if e == trial.epsilon else trial.at(e).pgd(some) for e in sizes},
    )
    noise = trial.damage(trial.noise())
    yield _at_least("PGD beats random noise of the same size", by_steps[some], noise, ("PGD", "noise"), 1.0)
    yield _at_least(
        "APGD is at least as strong as PGD at equal cost",
        trial.damage(trial.apgd(some)), by_steps[some], ("APGD", "PGD"), APGD_TOLERANCE,
    )  # fmt: skip
    yield _at_least(
        "White-box attacks are at least as strong as transferred ones",
        by_steps[some], trial.damage(on_baseline.attacked(some)), ("white-box", "transfer"), TOLERANCE,
    )  # fmt: skip
    yield _at_least(
        "An attack without gradients is not stronger than one with",
        by_steps[many], trial.damage(trial.square(settings.queries)), ("PGD", "Square"), TOLERANCE,
    )  # fmt: skip
    yield trial.gradients()
    yield trial.at(HUGE_EPSILON).wins_completely(some)


@dataclass(frozen=True)
class _Trial:
    """Attacks on one VAE. Their damage is the mean squared error of its reconstructions, for images in [-1,1]."""

    codec: Codec
    clean: Tensor
    epsilon: float
    seed: int

    def at(self, epsilon: float) -> _Trial:
        """Return the same trial with another budget."""
        return replace(self, epsilon=epsilon)

    @property
    def objective(self) -> Objective:
        """Return the squared error between reconstructions and clean images, one value per image."""
        return lambda images: mean_squared_error(self.codec.reconstruct(images), self.clean)

    @property
    def generators(self) -> Generators:
        """Return a new generator for each image, the same ones every time."""
        return image_generators(self.seed, range(len(self.clean)))

    @torch.no_grad()
    def damage(self, images: Tensor) -> float:
        """Return the mean squared error between reconstructions of `images` and clean images."""
        return self.objective(images).mean().item()

    def attacked(self, steps: int, *, restarts: int = 1) -> Tensor:
        """Return the images after PGD."""
        config = settling_pgd(self.epsilon, steps, restarts)
        return pgd(self.objective, self.clean, config, generators=self.generators)

    def pgd(self, steps: int, *, restarts: int = 1) -> float:
        """Return the damage of PGD."""
        return self.damage(self.attacked(steps, restarts=restarts))

    def apgd(self, steps: int) -> Tensor:
        """Return the images after APGD."""
        config = APGDConfig(epsilon=self.epsilon, num_steps=steps)
        return apgd(self.objective, self.clean, config, generators=self.generators)

    def square(self, queries: int) -> Tensor:
        """Return the images after the Square attack, which needs no gradients."""
        config = SquareConfig(epsilon=self.epsilon, num_queries=queries)
        return square_attack(self.objective, self.clean, config, generators=self.generators)

    def noise(self) -> Tensor:
        """Return images with each value moved up or down by epsilon at random: the largest noise in the budget."""
        budget = Budget(epsilon=self.epsilon)
        signs = draw_signs(self.clean.shape[1:], self.generators, like=self.clean)
        return budget.project(self.clean + budget.radius * signs, self.clean)

    def gradients(self) -> Check:
        """Check that the objective's gradient at a random start is finite and mostly not 0."""
        start = Budget(epsilon=self.epsilon).draw(self.clean, self.generators)
        _, gradient = value_and_gradient(self.objective, start)
        zero = (gradient == 0).float().mean().item()
        finite = bool(torch.isfinite(gradient).all())
        return Check(
            "Gradients do not vanish",
            finite and zero <= MAX_ZERO_GRADIENTS,
            f"{zero:.1%} of the values have a gradient of 0, all are {'finite' if finite else 'NOT finite'}",
        )

    def wins_completely(self, steps: int) -> Check:
        """Check that an attack with a huge budget makes reconstructions no better than one flat colour."""
        flat = self.clean.mean(dim=tuple(range(2, self.clean.ndim)), keepdim=True).expand_as(self.clean)
        attacked, flat_error = self.pgd(steps), mean_squared_error(flat, self.clean).mean().item()
        return Check(
            "A very large epsilon wins completely",
            attacked >= flat_error,
            f"epsilon {255 * self.epsilon:.0f}/255: {_psnr(attacked)}; a flat colour: {_psnr(flat_error)}",
        )


def _never_falls(question: str, damages: dict[str, float]) -> Check:
    """Check that no damage is smaller than the one before it, within `TOLERANCE`."""
    values = list(damages.values())
    passed = all(later >= TOLERANCE * earlier for earlier, later in pairwise(values))
    return Check(question, passed, ", ".join(f"{name}: {_psnr(value)}" for name, value in damages.items()))


def _at_least(question: str, one: float, other: float, names: tuple[str, str], tolerance: float) -> Check:
    """Check that the damage `one` reaches the share `tolerance` of the damage `other`."""
    return Check(question, one >= tolerance * other, f"{names[0]}: {_psnr(one)}, {names[1]}: {_psnr(other)}")


def _psnr(damage: float) -> str:
    """Return the PSNR of a mean squared error of images in [-1,1], as text.

    `metrics.pixels.psnr` returns the PSNR of each image after clipping; checks compare unclipped means over images.
    """
    ratio = PIXEL_RANGE**2 / damage if damage else math.inf
    return f"{min(10 * math.log10(ratio), MAX_PSNR):.2f} dB"
