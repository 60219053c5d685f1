"""How well a VAE reconstructs clean, attacked and corrupted images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from srl_utils.attacks.corruptions import gaussian_noise
from srl_utils.attacks.gradient import Objective, PGDConfig, pgd
from srl_utils.autoencoders import frozen
from srl_utils.codecs import Codec
from srl_utils.evaluation.metering import Meter, images_of
from srl_utils.losses import PerceptualDistance, ReconstructionLoss
from srl_utils.metrics import bootstrap_interval, latent_drift, psnr, ssim
from srl_utils.progress import progress_bar

Generators = list[torch.Generator]
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


class Record(NamedTuple):
    """One measured value of one image."""

    vae: str
    attack: str
    threat_model: str
    epsilon: float
    metric: str
    index: int
    value: float


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
    progress: str | None = None,
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
        progress: title of a bar on the console; None for no bar.
    """
    device = next(codec.decoder.parameters()).device
    batches = [range(start, min(start + batch_size, len(images))) for start in range(0, len(images), batch_size)]
    total = sum(perturbation.passes + 1 for perturbation in perturbations) * len(images)
    records: list[Record] = []
    with progress_bar(round(total), desc=progress or "", unit="pass", disable=progress is None) as bar:
        meter = Meter(bar)
        judged = meter.watched(codec)
        for batch, perturbation in product(batches, perturbations):
            numbers = indices[batch.start : batch.stop]
            clean = images[batch.start : batch.stop].to(device, memory_format=torch.channels_last)
            title = f"{progress}, {perturbation.name}: {images_of(batch, len(images))}"
            with meter.stage(title, len(batch) * (perturbation.passes + 1)):
                shown = perturbation.apply(judged, loss, clean, image_generators(seed, numbers))
                with torch.no_grad():
                    values = measure(judged.reconstruct(shown), clean, loss.perceptual)
                    if reference is not None and perturbation is CLEAN:
                        values |= drift(codec, reference, clean)
            records += to_records(codec.name, perturbation, perturbation.threat_model, numbers, values)
    return records


def measure(reconstruction: Tensor, clean: Tensor, perceptual: PerceptualDistance | None) -> dict[str, Tensor]:
    """PSNR, SSIM and, where it can be had, LPIPS of `[N,3,H,W]` images in [-1,1], `[N]` each."""
    values = {"psnr": psnr(reconstruction, clean), "ssim": ssim(reconstruction, clean)}
    if perceptual is not None:
        values["lpips"] = perceptual.distance(reconstruction, perceptual.features(clean))
    return values


def drift(codec: Codec, reference: Codec, clean: Tensor) -> dict[str, Tensor]:
    """How far the latents of clean images have left those of `reference`, `[N]`; nothing where they have other shapes."""
    latents, others = codec.encode(clean), reference.encode(clean)
    return {"drift": latent_drift(latents, others)} if latents.shape == others.shape else {}


def to_records(
    vae: str, perturbation: Perturbation, threat_model: str, numbers: Sequence[int], values: dict[str, Tensor]
) -> list[Record]:
    """One record per image and metric; `values` has a tensor `[N]` for each metric."""
    return [
        Record(vae, perturbation.name, threat_model, perturbation.epsilon, metric, number, value)
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
