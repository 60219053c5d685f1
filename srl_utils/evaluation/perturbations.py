"""What is done to images before a VAE sees them: attacks on its reconstruction or its latents, and noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from srl_utils.attacks.corruptions import gaussian_noise
from srl_utils.attacks.draws import Generators
from srl_utils.attacks.gradient import Objective, PGDConfig, expected, pgd
from srl_utils.evaluation.metering import ENCODER
from srl_utils.metrics.losses import ReconstructionLoss, mean_squared_error
from srl_utils.vae.codec import Codec
from srl_utils.vae.networks import frozen

Attack = Callable[[Objective, Tensor, Generators], Tensor]
"""Objective, clean images `[N,3,H,W]` in [-1,1] and a generator for each image to attacked images."""
NO_THREAT, TRANSFER, ADAPTIVE, ANY_ATTACK = "none", "transfer", "adaptive", "certified"
"""Threat models: no adversary; attacks made on the baseline; attacks made on the evaluated VAE itself; every attack."""
GAUSSIAN_NOISE = "gaussian-noise"
DRAWS = 10
"""Of a random purifier, over which an attack takes the mean in each step."""
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
    joint: bool = False
    """Whether images of one call are perturbed as one set, so that an image's result depends on the others."""

    @property
    def adversarial(self) -> bool:
        """Return whether it is an attack on a VAE, and not a corruption."""
        return self.objective is not None


CLEAN = Perturbation(name="clean", apply=lambda codec, clean, generators: clean)


@dataclass(frozen=True)
class Aim:
    """What an attack makes as large as it can."""

    name: str
    """As results name it."""
    objective: Callable[[Codec, Tensor], Objective]
    """VAE and clean images to the objective of an attack on them."""
    passes: float = 1.0
    """Cost of the objective for one image, in passes through encoder and decoder."""


def at_reconstructions(loss: ReconstructionLoss) -> Aim:
    """Return the aim of a large `loss` between clean images and the VAE's reconstructions of attacked ones."""

    def objective(codec: Codec, clean: Tensor) -> Objective:
        target = loss.target(clean)
        return lambda images: loss(codec.reconstruct(images), target)

    return Aim(loss.name, objective)


@torch.no_grad()
def latent_distance(codec: Codec, clean: Tensor) -> Objective:
    """Return the mean squared distance of images' latents from those of the clean images."""
    latents = codec.encode(clean)
    return lambda images: mean_squared_error(codec.encode(images), latents)


@torch.no_grad()
def token_flips(codec: Codec, clean: Tensor) -> Objective:
    """Return the share of tokens that differ from those of the clean images, with a straight-through gradient.

    The temperature is the mean squared distance of an image's clean features from their nearest codes. The VAE must have
    a codebook.
    """
    codebook = codec.codebook
    assert codebook is not None  # `select` leaves the attack out otherwise
    features = codec.encode(clean)
    tokens, temperature = codebook.tokens(features), codebook.error(features)
    return lambda images: codebook.straight_through_flips(codec.encode(images), tokens, temperature)


MSE = at_reconstructions(ReconstructionLoss())
LATENTS = Aim("latent distance", latent_distance, passes=ENCODER)
TOKENS = Aim("token flips", token_flips, passes=ENCODER)


def attack_on(aim: Aim, name: str, attack: Attack, *, epsilon: float, calls: int) -> Perturbation:
    """Return an attack.

    Args:
        aim: what it maximises.
        name: of the perturbation.
        attack: searches for the perturbed images.
        epsilon: budget in units of a [0,1] image.
        calls: how often it computes the objective of an image; a gradient counts as a second call.
    """

    def apply(codec: Codec, clean: Tensor, generators: Generators) -> Tensor:
        with frozen(codec.encoder):
            objective = expected(aim.objective(codec, clean), DRAWS if codec.random else 1)
            return attack(objective, clean, generators)

    return Perturbation(name=name, objective=aim.name, epsilon=epsilon, apply=apply, passes=aim.passes * calls)


def on_first_frame(attack: Attack) -> Attack:
    """Return an attack that changes the first frame of clips alone, which is what users of image-to-video publish."""

    def changed(objective: Objective, clean: Tensor, generators: Generators) -> Tensor:
        first, others = clean[:, :, :1], clean[:, :, 1:]
        frame = attack(lambda frames: objective(torch.cat([frames, others], dim=2)), first, generators)
        return torch.cat([frame, others], dim=2)

    return changed


def pgd_attack(config: PGDConfig) -> Perturbation:
    """Return PGD on the reconstruction, named by its steps and restarts, such as `pgd-50x2`."""
    restarts = f"x{config.num_restarts}" if config.num_restarts > 1 else ""
    return attack_on(
        MSE,
        f"pgd-{config.num_steps}{restarts}",
        lambda objective, clean, generators: pgd(objective, clean, config, generators=generators),
        epsilon=config.epsilon,
        calls=2 * config.num_steps * config.num_restarts,
    )


def usual_attack(epsilon: float) -> Perturbation:
    """Return `pgd-10`: ten steps of epsilon/4."""
    return pgd_attack(settling_pgd(epsilon, 10, 1))


def strong_attack(epsilon: float) -> Perturbation:
    """Return `pgd-50x2`: 50 steps of epsilon/8, 2 restarts; it keeps the best iterate of each image."""
    return pgd_attack(settling_pgd(epsilon, 50, 2))


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
