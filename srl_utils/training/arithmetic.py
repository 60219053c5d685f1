"""Floating-point operations of a training step, counted on the network's shapes before weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass

import lpips
import torch
from diffusers import ModelMixin
from torch.utils.flop_counter import FlopCounterMode

from srl_utils.images.pixels import frames_of
from srl_utils.training.objectives import OBJECTIVES, Objective
from srl_utils.training.similarities import mean_area
from srl_utils.vae.networks import LatentDecoder, LatentEncoder, latent_shape


@dataclass(frozen=True, kw_only=True)
class StepArithmetic:
    """Floating-point operations of one image. A backward pass costs one forward pass for each kind of gradient."""

    encoder: int
    decoder: int
    perceptual: int
    """One forward pass each; `perceptual` is 0 without LPIPS."""
    pgd_steps: int
    reconstruction: float
    """How much the loss decodes: 0 for nothing, 1 for a whole image."""
    passes: int
    """How often the encoder in training encodes an image: as it is attacked, and as it is."""
    reference: int
    """How often frozen encoders encode them."""
    latent_attack_share: float
    """Share of the images whose attack needs no decoder."""

    @property
    def attack(self) -> int:
        """Operations of the attack: in each step, a forward pass and a backward pass to the pixels."""
        decoded = (1 - self.latent_attack_share) * (self.decoder + self.perceptual)
        return round(self.pgd_steps * 2 * (self.encoder + decoded))

    @property
    def outer(self) -> int:
        """Operations of the update: passes of the encoder with weight gradients, reference, reconstruction, target features."""
        encoding = (3 * self.passes + self.reference) * self.encoder
        return encoding + round(self.reconstruction * (2 * self.decoder + 3 * self.perceptual))

    @property
    def image(self) -> int:
        """Operations of attack and update."""
        return self.attack + self.outer

    def table(self) -> str:
        """Return the parts of a step, a line each, in TFLOP."""
        rows = {
            "encoder forward": self.encoder,
            "decoder forward": self.decoder,
            "LPIPS forward": self.perceptual,
            f"attack ({self.pgd_steps} steps)": self.attack,
            "outer step": self.outer,
            "one image, whole step": self.image,
        }
        return "\n".join(f"  {name:<24}{flops / 1e12:>12.4f} TFLOP" for name, flops in rows.items())


def step_arithmetic(
    vae: ModelMixin,
    *,
    resolution: int,
    num_frames: int = 1,
    pgd_steps: int,
    lpips_net: str | None,
    objective: Objective = OBJECTIVES["srl"],
    originality: bool = True,
    latent_distance: bool = False,
    latent_attack_share: float = 0.0,
) -> StepArithmetic:
    """Count the operations of a step on shapes alone, without weights or memory.

    Args:
        vae: the VAE; its weights are not used.
        resolution: side of the images in pixels.
        num_frames: frames of a clip; 1 for images.
        pgd_steps: steps of the attack, if the objective has one; 0 without.
        lpips_net: trunk of LPIPS; None without LPIPS.
        objective: of attack and loss.
        originality: whether the loss has the originality term.
        latent_distance: whether the loss has the distance of attacked latents, if the objective leaves a choice.
        latent_attack_share: share of the images that are attacked on their latents, likewise.
    """
    with torch.device("meta"):
        twin = type(vae).from_config(vae.config).to("meta")  # some classes make a buffer elsewhere
        image = torch.empty(1, 3, *([num_frames] if num_frames > 1 else []), resolution, resolution)
        latent = torch.empty(1, *latent_shape(LatentEncoder(twin), image))
        perceptual = lpips.LPIPS(net=lpips_net, pretrained=False, pnet_rand=True, verbose=False) if lpips_net else None
        encoder, decoder = _count(LatentEncoder(twin), image), _count(LatentDecoder(twin), latent)
        trunk = _count(perceptual.net, frames_of(image)) if perceptual else 0
    share = objective.latent_share(latent_attack_share)
    attacked = objective.victim is not None
    distance = share > 0 or objective.latent_weight(latent_distance) > 0
    anchored, own_anchor = objective.anchor == "original" and distance, objective.anchor == "trained"
    areas = {None: 0.0, "transformed": mean_area(latent.shape[-1])}
    return StepArithmetic(
        encoder=encoder,
        decoder=decoder,
        perceptual=trunk,
        pgd_steps=pgd_steps if attacked else 0,
        reconstruction=areas.get(objective.decodes, 1.0),
        passes=attacked + (originality or not attacked or objective.decodes == "clean"),
        reference=(originality or anchored) + own_anchor,
        latent_attack_share=share,
    )


def _count(module: torch.nn.Module, tensor: torch.Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(tensor)
    return counter.get_total_flops()
