"""What is done to images before a VAE sees them: attacks on its reconstruction, and noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from srl_utils.attacks.corruptions import gaussian_noise
from srl_utils.attacks.draws import Generators
from srl_utils.attacks.gradient import Objective, PGDConfig, pgd
from srl_utils.metrics.losses import ReconstructionLoss
from srl_utils.vae.codec import Codec
from srl_utils.vae.networks import frozen

Attack = Callable[[Objective, Tensor, Generators], Tensor]
"""Objective, clean images `[N,3,H,W]` in [-1,1] and a generator for each image to attacked images."""
NO_THREAT, TRANSFER, ADAPTIVE = "none", "transfer", "adaptive"
"""Threat models: no adversary; attacks made on the baseline; attacks made on the evaluated VAE itself."""
GAUSSIAN_NOISE = "gaussian-noise"
MSE = ReconstructionLoss()
AS_PUBLISHED = "as published"
"""Objective of protections in the results: that of their authors."""


@dataclass(frozen=True, kw_only=True)
class Perturbation:
    """An attack, a protection or a corruption, and how it is named in the results."""

    name: str
    objective: str | None = None
    """What it maximises, such as `mse`; None for a corruption."""
    epsilon: float = 0.0
    """Budget in units of a [0,1] image."""
    apply: Callable[[Codec, Tensor, Generators], Tensor]
    """VAE, clean images `[N,3,H,W]` in [-1,1] and a generator for each image to perturbed images."""
    goal: Callable[[Codec, Tensor, Generators], Tensor] | None = None
    """For an attack that pulls latents: arguments of `apply` to the raw latents that it pulls them to, `[N,C,h,w]`."""
    passes: float = 0
    """Cost of one image, in passes through encoder and decoder."""
    impossible_on: frozenset[str] = frozenset()
    """Names of the VAEs on which it cannot be made."""

    @property
    def adversarial(self) -> bool:
        """Return whether it is an attack on a VAE, and not a corruption."""
        return self.objective is not None


CLEAN = Perturbation(name="clean", apply=lambda codec, clean, generators: clean)


def on_reconstruction(
    name: str, attack: Attack, *, epsilon: float, passes: float, loss: ReconstructionLoss = MSE
) -> Perturbation:
    """Return an attack that maximises `loss` between clean images and the VAE's reconstruction of attacked ones.

    Args:
        name: of the perturbation.
        attack: searches for the perturbed images.
        epsilon: budget in units of a [0,1] image.
        passes: cost of one image, in passes through encoder and decoder.
        loss: objective of the attack.
    """

    def apply(codec: Codec, clean: Tensor, generators: Generators) -> Tensor:
        target = loss.target(clean)
        with frozen(codec.encoder):
            return attack(lambda images: loss(codec.reconstruct(images), target), clean, generators)

    return Perturbation(name=name, objective=loss.name, epsilon=epsilon, apply=apply, passes=passes)


def reconstruction_attack(
    config: PGDConfig, loss: ReconstructionLoss = MSE, *, name: str | None = None
) -> Perturbation:
    """Return PGD on the reconstruction; the default name gives its steps and restarts, such as `pgd-50x2`."""
    restarts = f"x{config.num_restarts}" if config.num_restarts > 1 else ""
    return on_reconstruction(
        name or f"pgd-{config.num_steps}{restarts}",
        lambda objective, clean, generators: pgd(objective, clean, config, generators=generators),
        epsilon=config.epsilon,
        passes=2 * config.num_steps * config.num_restarts,
        loss=loss,
    )


def usual_attack(epsilon: float) -> Perturbation:
    """Return `pgd-10`: ten steps of epsilon/4."""
    return reconstruction_attack(settling_pgd(epsilon, 10, 1))


def strong_attack(epsilon: float) -> Perturbation:
    """Return `pgd-50x2`: 50 steps of epsilon/8, 2 restarts; it keeps the best iterate of each image."""
    return reconstruction_attack(settling_pgd(epsilon, 50, 2))


def settling_pgd(epsilon: float, num_steps: int, num_restarts: int) -> PGDConfig:
    """Return PGD that keeps its best iterate, with steps of max(2.5/`num_steps`, 1/8) of the budget `epsilon`."""
    return PGDConfig(
        epsilon=epsilon,
        step_size=epsilon * max(2.5 / num_steps, 1 / 8) if num_steps else epsilon,
        num_steps=num_steps,
        num_restarts=num_restarts,
        keep_best=True,
    )


def noise(epsilon: float) -> Perturbation:
    """Return Gaussian noise of standard deviation `epsilon`: as much energy as an attack, but not adversarial."""
    return Perturbation(
        name=GAUSSIAN_NOISE,
        epsilon=epsilon,
        apply=lambda codec, clean, generators: gaussian_noise(clean, epsilon, generators=generators),
    )
