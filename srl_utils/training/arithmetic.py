"""Floating-point operations of a training step, counted on the network's shapes before weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass

import lpips
import torch
from diffusers import ModelMixin
from torch.utils.flop_counter import FlopCounterMode

from srl_utils.images.pixels import frames_of
from srl_utils.training.step import TrainingObjective
from srl_utils.vae.networks import LatentDecoder, LatentEncoder, latent_shape


@dataclass(frozen=True, kw_only=True)
class StepArithmetic:
    """Floating-point operations of one image. A backward pass costs one forward pass for each kind of gradient."""

    encoder: int
    decoder: int
    perceptual: int
    """One forward pass each; `perceptual` is 0 without LPIPS."""
    pgd_steps: int
    reconstruction: bool
    """Whether the loss decodes images."""
    clean: bool
    """Whether the encoder encodes the clean images."""
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
        """Operations of the update: attacked pass (weight gradients in the encoder only), clean pass, reference, target features."""
        attacked = 3 * self.encoder + self.reconstruction * 2 * (self.decoder + self.perceptual)
        clean = (3 * self.clean + self.reference) * self.encoder
        return attacked + clean + self.perceptual

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
    objective: TrainingObjective = "srl",
    originality: bool = True,
    latent_distance: bool = False,
    latent_attack_share: float = 0.0,
) -> StepArithmetic:
    """Count the operations of a step on shapes alone, without weights or memory.

    Args:
        vae: the VAE; its weights are not used.
        resolution: side of the images in pixels.
        num_frames: frames of a clip; 1 for images.
        pgd_steps: steps of the attack; 0 without one.
        lpips_net: trunk of LPIPS; None without LPIPS.
        objective: of attack and loss.
        originality: whether the loss has the originality term.
        latent_distance: whether `srl` has the distance of attacked latents.
        latent_attack_share: share of the images that `srl` attacks on their latents.
    """
    with torch.device("meta"):
        twin = type(vae).from_config(vae.config).to("meta")  # some classes make a buffer elsewhere
        image = torch.empty(1, 3, *([num_frames] if num_frames > 1 else []), resolution, resolution)
        latent = torch.empty(1, *latent_shape(LatentEncoder(twin), image))
        perceptual = lpips.LPIPS(net=lpips_net, pretrained=False, pnet_rand=True, verbose=False) if lpips_net else None
        encoder, decoder = _count(LatentEncoder(twin), image), _count(LatentDecoder(twin), latent)
        trunk = _count(perceptual.net, frames_of(image)) if perceptual else 0
    of_latents = objective == "feature" or (objective == "srl" and (latent_distance or latent_attack_share > 0))
    return StepArithmetic(
        encoder=encoder,
        decoder=decoder,
        perceptual=trunk,
        pgd_steps=pgd_steps,
        reconstruction=objective != "feature",
        clean=originality or objective == "trades",
        reference=(originality or of_latents) + (objective == "trades"),
        latent_attack_share=latent_attack_share if objective == "srl" else 1.0,
    )


def _count(module: torch.nn.Module, tensor: torch.Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(tensor)
    return counter.get_total_flops()
