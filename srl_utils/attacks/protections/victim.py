"""The networks that a protection attacks, and the batch of images that it protects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from srl_utils.attacks.denoiser import Denoiser
from srl_utils.attacks.draws import Generators, draw_normal
from srl_utils.metrics.losses import ImageDistance
from srl_utils.vae.codec import Codec
from srl_utils.vae.networks import Moments


@dataclass(frozen=True, kw_only=True)
class Victim:
    """The networks that a protection attacks. Images are `[N,3,H,W]` in [-1,1]; `Victim.of` makes one from a VAE.

    Attributes:
        encode: maps images to the posterior of their raw latents.
        decode: maps raw latents `[N,C,h,w]` to images.
        scale: maps raw latents to the denoiser's; it must multiply by a factor and add a shift, of each channel or of
            all.
        denoiser: the diffusion model's UNet. Protections with a `prompt` need it.
        perceptual: bounds Glaze, whose budget is meant for LPIPS on VGG.
    """

    encode: Callable[[Tensor], Moments]
    decode: Callable[[Tensor], Tensor]
    scale: Callable[[Tensor], Tensor]
    denoiser: Denoiser | None = None
    perceptual: ImageDistance | None = None

    @classmethod
    def of(
        cls,
        codec: Codec,
        pipe: DiffusionPipeline | None = None,
        *,
        denoiser: Denoiser | None = None,
        perceptual: ImageDistance | None = None,
    ) -> Victim:
        """Return the victim that attacks a VAE.

        Args:
            codec: the VAE.
            pipe: the pipeline whose denoiser the latents are scaled for; None scales as the VAE's configuration says.
            denoiser: see `Victim`; `Denoiser.from_pipeline(pipe, prompt)` makes one.
            perceptual: see `Victim`; `load_perceptual_distance("vgg")` loads it.
        """
        return cls(
            encode=codec.moments,
            decode=codec.decoder,
            scale=partial(codec.scale, pipe=pipe),
            denoiser=denoiser,
            perceptual=perceptual,
        )

    def unscale(self, latents: Tensor) -> Tensor:
        """Return the denoiser's latents as raw latents: the inverse of `scale`."""
        shift = self.scale(torch.zeros_like(latents))
        factor = self.scale(torch.ones_like(latents)) - shift
        return (latents - shift) / factor


@dataclass(frozen=True, kw_only=True)
class ProtectedBatch:
    """A batch of images to protect, with everything that its loss needs.

    Attributes:
        victim: the networks that are attacked.
        clean: `[N,3,H,W]` in [-1,1].
        target: the images to imitate, as many as `clean`; None for a protection without a target.
        generators: one CPU generator per image; None draws from PyTorch's global generator.
    """

    victim: Victim
    clean: Tensor
    target: Tensor | None
    generators: Generators | None

    @property
    def needed_target(self) -> Tensor:
        """Return the target, which `protect` has checked to be there."""
        assert self.target is not None
        return self.target

    @property
    def denoiser(self) -> Denoiser:
        """Return the victim's denoiser, which `protect` has checked to be there."""
        assert self.victim.denoiser is not None
        return self.victim.denoiser

    @property
    def perceptual(self) -> ImageDistance:
        """Return the distance that bounds Glaze, which `protect` has checked to be there."""
        assert self.victim.perceptual is not None
        return self.victim.perceptual

    @torch.no_grad()
    def target_posterior(self) -> Moments:
        """Return the posterior of the target's raw latents."""
        return self.victim.encode(self.needed_target)

    def draw(self, posterior: Moments) -> Tensor:
        """Draw raw latents `[N,C,h,w]` from `posterior`."""
        return posterior.latent(draw_normal(self.generators, like=posterior.mean))

    def sample(self, images: Tensor) -> Tensor:
        """Draw raw latents `[N,C,h,w]` from the posterior of `images`."""
        return self.draw(self.victim.encode(images))

    def sample_scaled(self, images: Tensor) -> Tensor:
        """Draw latents `[N,C,h,w]` from the posterior of `images` and scale them for the denoiser."""
        return self.victim.scale(self.sample(images))
