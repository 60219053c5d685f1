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
"""Objective, clean images `[N,3,H,W]` and a generator for each to attacked images."""


@dataclass(frozen=True, kw_only=True)
class Perturbation:
    """One line of the results: what is done to the images before the VAE sees them."""

    name: str
    threat_model: str
    """`none` where no adversary is at work, `adaptive` where the attack is made on the VAE under judgement."""
    epsilon: float
    """Units of a [0,1] image."""
    apply: Callable[[Codec, ReconstructionLoss, Tensor, Generators], Tensor]
    passes: float = 0
    """Through encoder and decoder per image, about: what it costs to make."""
    impossible_on: frozenset[str] = frozenset()
    """Names of the VAEs that it cannot be made on."""

    @property
    def adversarial(self) -> bool:
        return self.threat_model != "none"


CLEAN = Perturbation(name="clean", threat_model="none", epsilon=0.0, apply=lambda codec, loss, clean, generators: clean)


def on_reconstruction(
    name: str, attack: Attack, *, epsilon: float, passes: float, own_loss: ReconstructionLoss | None = None
) -> Perturbation:
    """`attack` on the reconstruction loss of a VAE; `own_loss` replaces the one the evaluation attacks with."""

    def apply(codec: Codec, loss: ReconstructionLoss, clean: Tensor, generators: Generators) -> Tensor:
        used = own_loss or loss
        target = used.target(clean)
        with frozen(codec.encoder):
            return attack(lambda images: used(codec.reconstruct(images), target), clean, generators)

    return Perturbation(name=name, threat_model="adaptive", epsilon=epsilon, apply=apply, passes=passes)


def reconstruction_attack(config: PGDConfig) -> Perturbation:
    """PGD on the reconstruction loss of the VAE under judgement, named after its steps and restarts."""
    restarts = f"x{config.num_restarts}" if config.num_restarts > 1 else ""
    return on_reconstruction(
        f"pgd-{config.num_steps}{restarts}",
        lambda objective, clean, generators: pgd(objective, clean, config, generators=generators),
        epsilon=config.epsilon,
        passes=2 * config.num_steps * config.num_restarts,
    )


def usual_attack(epsilon: float) -> Perturbation:
    """Ten steps of epsilon/4, whatever the training does, so that trainings can be compared."""
    return reconstruction_attack(settling_pgd(epsilon, 10, 1))


def strong_attack(epsilon: float) -> Perturbation:
    """An attack the training does not see: 50 steps of epsilon/8, 2 restarts, the best iterate of each image."""
    return reconstruction_attack(settling_pgd(epsilon, 50, 2))


def settling_pgd(epsilon: float, num_steps: int, num_restarts: int) -> PGDConfig:
    """PGD that keeps its best: steps long enough to cross the ball in ten, short enough to settle in a hundred."""
    return PGDConfig(
        epsilon=epsilon,
        step_size=epsilon * max(2.5 / num_steps, 1 / 8) if num_steps else epsilon,
        num_steps=num_steps,
        num_restarts=num_restarts,
        keep_best=True,
    )


def noise(epsilon: float) -> Perturbation:
    """White noise with standard deviation `epsilon`: about the energy of an attack, without its aim."""
    return Perturbation(
        name="gaussian-noise",
        threat_model="none",
        epsilon=epsilon,
        apply=lambda codec, loss, clean, generators: gaussian_noise(clean, epsilon, generators=generators),
    )
