"""Attack an image on one VAE, and compare what two VAEs make of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from srl_utils.attacks.draws import image_generators
from srl_utils.errors import UserError
from srl_utils.evaluation.catalogue import NOISE, AttackResources, select
from srl_utils.evaluation.metering import Meter
from srl_utils.evaluation.perturbations import Perturbation
from srl_utils.images.pixels import format_pixel_distance
from srl_utils.metrics.pixels import psnr
from srl_utils.vae.codec import Codec

ATTACKS: Mapping[str, str] = {
    "PGD": "pgd-{steps}",
    "PGD on latents": "pgd-{steps}-latents",
    "APGD": "apgd-{steps}",
    "Square (no gradients)": "square-{steps}",
    "PhotoGuard": "photoguard-encoder",
    "Mist": "mist-textural",
    "PID": "pid",
    "Gaussian noise": NOISE,
}
"""What visitors choose from, and the names in the evaluation."""
SEED = 0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What two VAEs make of an attacked image.

    Attributes:
        clean: the image, `[1,3,R,R]` in [-1,1].
        attacked: the attacked image.
        reconstructions: of the attacked image, by VAE.
        clean_psnr: PSNR in dB of the reconstruction of the clean image, by VAE.
        attacked_psnr: PSNR in dB of the reconstruction of the attacked image to the clean image, by VAE.
    """

    clean: Tensor
    attacked: Tensor
    reconstructions: Mapping[str, Tensor]
    clean_psnr: Mapping[str, float]
    attacked_psnr: Mapping[str, float]


def attack_of(name: str, *, epsilon: float, steps: int) -> Perturbation:
    """Return an attack of `ATTACKS`.

    Args:
        name: as visitors see it.
        epsilon: budget in units of a [0,1] image.
        steps: of the attack; protections take no more than their authors.

    Raises:
        UserError: if there is no such attack.
    """
    if name not in ATTACKS:
        raise UserError(f"there is no attack '{name}'; choose from {', '.join(ATTACKS)}")
    resources = AttackResources(max_steps=steps)
    (attack,) = select([ATTACKS[name].format(steps=steps)], [epsilon], resources).perturbations
    return attack


def perturbed(clean: Tensor, victim: Codec, attack: Perturbation, meter: Meter) -> Tensor:
    """Return the attacked image, `[1,3,R,R]` in [-1,1]."""
    with meter.stage(f"{attack.name}, {format_pixel_distance(attack.epsilon)}", attack.passes):
        return attack.apply(meter.watched(victim), clean.to(victim.device), image_generators(SEED, [0])).detach()


@torch.no_grad()
def compare(clean: Tensor, victim: Codec, other: Codec, attack: Perturbation, bar: tqdm) -> Outcome:
    """Attack an image and reconstruct it.

    Args:
        clean: `[1,3,R,R]` in [-1,1].
        victim: the attack is made on it.
        other: compared with it; may be the same.
        attack: an attack.
        bar: shows the progress.
    """
    clean = clean.to(victim.device)
    bar.total = max(round(attack.passes), 1)
    with torch.enable_grad():
        attacked = perturbed(clean, victim, attack, Meter(bar))
    codecs = {codec.name: codec for codec in (victim, other)}
    reconstructions = {name: codec.reconstruct(attacked) for name, codec in codecs.items()}
    return Outcome(
        clean=clean,
        attacked=attacked,
        reconstructions=reconstructions,
        clean_psnr={name: psnr(codec.reconstruct(clean), clean).item() for name, codec in codecs.items()},
        attacked_psnr={name: psnr(image, clean).item() for name, image in reconstructions.items()},
    )


def amplified(clean: Tensor, attacked: Tensor, factor: float) -> Tensor:
    """Return the difference of two images in [-1,1], `factor` times as large, on grey; values beyond are clipped."""
    return (factor * (attacked - clean)).clamp(-1, 1)
