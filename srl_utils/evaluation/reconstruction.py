"""How well a VAE reconstructs clean, attacked and corrupted images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from srl_utils.attacks.corruptions import gaussian_noise
from srl_utils.attacks.gradient import PGDConfig, pgd
from srl_utils.autoencoders import LatentDecoder, LatentEncoder, frozen, split_moments
from srl_utils.losses import ReconstructionLoss
from srl_utils.metrics import bootstrap_interval, latent_drift, psnr, ssim

Generators = list[torch.Generator]


@dataclass(frozen=True)
class Codec:
    """The VAE under judgement: images to posterior-mean latents and back, with its name in the results."""

    name: str
    encoder: LatentEncoder
    decoder: LatentDecoder

    def encode(self, images: Tensor) -> Tensor:
        return split_moments(self.encoder(images)).mean

    def reconstruct(self, images: Tensor) -> Tensor:
        return self.decoder(self.encode(images))


@dataclass(frozen=True, kw_only=True)
class Perturbation:
    """One line of the results: what is done to the images before the VAE sees them."""

    name: str
    threat_model: str
    """`none` where no adversary is at work, `adaptive` where the attack is made on the VAE under judgement."""
    epsilon: float
    """Units of a [0,1] image."""
    apply: Callable[[Codec, ReconstructionLoss, Tensor, Generators], Tensor]


class Record(NamedTuple):
    """One measured value of one image."""

    vae: str
    attack: str
    threat_model: str
    epsilon: float
    metric: str
    index: int
    value: float


CLEAN = Perturbation(
    name="clean", threat_model="none", epsilon=0.0, apply=lambda codec, loss, clean, generators: clean
)


def reconstruction_attack(config: PGDConfig) -> Perturbation:
    """PGD on the reconstruction loss of the VAE under judgement, named after its steps and restarts."""
    restarts = f"x{config.num_restarts}" if config.num_restarts > 1 else ""

    def apply(codec: Codec, loss: ReconstructionLoss, clean: Tensor, generators: Generators) -> Tensor:
        target = loss.target(clean)
        with frozen(codec.encoder):
            return pgd(
                lambda images: loss(codec.reconstruct(images), target), clean, config, generators=generators
            )

    return Perturbation(
        name=f"pgd-{config.num_steps}{restarts}",
        threat_model="adaptive",
        epsilon=config.epsilon,
        apply=apply,
    )


def strong_attack(training_attack: PGDConfig) -> Perturbation:
    """An attack the training does not see: 50 steps of epsilon/8, 2 restarts, the best iterate of each image."""
    epsilon = training_attack.epsilon
    return reconstruction_attack(
        replace(training_attack, num_steps=50, step_size=epsilon / 8, num_restarts=2, random_start=True)
    )


def noise(epsilon: float) -> Perturbation:
    """White noise with standard deviation `epsilon`: about the energy of an attack, without its aim."""
    return Perturbation(
        name="gaussian-noise",
        threat_model="none",
        epsilon=epsilon,
        apply=lambda codec, loss, clean, generators: gaussian_noise(clean, epsilon, generators=generators),
    )


def image_generators(seed: int, indices: Iterable[int]) -> Generators:
    """A generator for each image number: what is drawn for an image does not depend on its batch."""
    return [torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63) for index in indices]


def evaluate(
    codec: Codec,
    images: Tensor,
    perturbations: Sequence[Perturbation],
    loss: ReconstructionLoss,
    *,
    indices: Sequence[int],
    seed: int,
    batch_size: int,
    reference: Codec | None = None,
) -> list[Record]:
    """PSNR, SSIM (and LPIPS where `loss` has it) of reconstructions against the clean images, per image.

    Args:
        codec: the VAE under judgement.
        images: `[N,3,H,W]` in [-1,1], on the CPU.
        perturbations: what is done to the images first.
        loss: the objective of the attacks.
        indices: number of each image in the whole evaluation; with `seed` it fixes the random draws.
        seed: of the attacks' random starts and of the noise.
        batch_size: images attacked at a time.
        reference: the original VAE; given, the drift of the clean latents from its own is measured too.
    """
    device = next(codec.decoder.parameters()).device
    records: list[Record] = []
    for start in range(0, len(images), batch_size):
        numbers = indices[start : start + batch_size]
        clean = images[start : start + batch_size].to(device, memory_format=torch.channels_last)
        for perturbation in perturbations:
            shown = perturbation.apply(codec, loss, clean, image_generators(seed, numbers))
            values = _measure(codec, shown, clean, loss)
            if reference is not None and perturbation is CLEAN:
                values["drift"] = _drift(codec, reference, clean)
            records += _records(codec.name, perturbation, numbers, values)
    return records


@torch.no_grad()
def _measure(codec: Codec, shown: Tensor, clean: Tensor, loss: ReconstructionLoss) -> dict[str, Tensor]:
    reconstruction = codec.reconstruct(shown)
    values = {"psnr": psnr(reconstruction, clean), "ssim": ssim(reconstruction, clean)}
    if loss.perceptual is not None:
        values["lpips"] = loss.terms(reconstruction, loss.target(clean)).lpips
    return values


@torch.no_grad()
def _drift(codec: Codec, reference: Codec, clean: Tensor) -> Tensor:
    return latent_drift(codec.encode(clean), reference.encode(clean))


def _records(
    vae: str, perturbation: Perturbation, numbers: Sequence[int], values: dict[str, Tensor]
) -> list[Record]:
    return [
        Record(vae, perturbation.name, perturbation.threat_model, perturbation.epsilon, metric, number, value)
        for metric, per_image in values.items()
        for number, value in zip(numbers, per_image.tolist(), strict=True)
    ]


def to_rows(records: Sequence[Record]) -> list[dict[str, object]]:
    """Means over images with 95% bootstrap intervals, in the project's row format."""
    groups: dict[tuple, dict[int, float]] = defaultdict(dict)
    for record in records:
        groups[record[:5]][record.index] = record.value
    rows = []
    for (vae, attack, threat_model, epsilon, metric), by_image in groups.items():
        values = [by_image[index] for index in sorted(by_image)]
        rows.append(
            {
                "vae": vae,
                "attack": attack,
                "threat_model": threat_model,
                "epsilon": epsilon,
                "metric": metric,
                "value": sum(values) / len(values),
                "ci95": list(bootstrap_interval(values)),
                "n": len(values),
            }
        )
    return rows
