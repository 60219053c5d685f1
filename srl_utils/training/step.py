"""The loss of one SRL-VAE step (arXiv 2504.17219), computed fast.

For images x, the encoder E being trained, its frozen original E0 and the frozen decoder D:

    delta     = argmax over |delta| <= epsilon of  MSE(D(E(x + delta)), x) + lambda LPIPS(D(E(x + delta)), x)
    L_robust  = MSE(D(E(x + delta)), x) + lambda LPIPS(D(E(x + delta)), x)
    L_orig    = |mean E(x) - mean E0(x)|^2 + |variance E(x) - variance E0(x)|^2
    loss      = L_robust + alpha L_orig

`benchmarks/train_step.py` has the same written plainly, and a test holds one against the other. What differs is only
what changes no result beyond rounding: the attack differentiates with respect to the images alone, through a frozen
mirror of the encoder; frozen weights are held in the precision they are used in, in the attack LPIPS's too; the target's
features are computed once; clean and attacked images take one pass; nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from srl_utils.attacks.corruptions import gaussian_noise
from srl_utils.attacks.draws import Generators, draw
from srl_utils.attacks.gradient import PGDConfig, pgd
from srl_utils.images.pixels import PIXEL_RANGE
from srl_utils.metrics.losses import ReconstructionLoss, Target, originality_loss
from srl_utils.vae.layers import with_compilable_layers, with_merged_upsampling
from srl_utils.vae.networks import (
    EncoderMirror,
    LatentDecoder,
    LatentEncoder,
    Moments,
    frozen_copy,
    latent_shape,
    split_moments,
)

TERMS = ("loss", "mse", "lpips", "originality", "attacked_psnr")
"""Of a batch, in this order: its mean loss, the three terms before they are weighted, and PSNR in dB under attack."""


@dataclass(frozen=True, kw_only=True)
class Networks:
    """The parts of a VAE that the step uses."""

    vae: AutoencoderKL
    """Its encoder is trained in place, in float32; its decoder stays as it is."""
    encoder: LatentEncoder
    wrapped_encoder: nn.Module
    """What the loss must call: the encoder, within what joins the processes' gradients."""
    mirror: EncoderMirror
    decoder: LatentDecoder
    reference: LatentEncoder
    loss: ReconstructionLoss
    attacked_loss: ReconstructionLoss
    """What the attack maximises: the same, with LPIPS's trunk in the precision of the networks."""

    @property
    def device(self) -> torch.device:
        return next(self.decoder.parameters()).device


def build_networks(
    vae: AutoencoderKL,
    loss: ReconstructionLoss,
    *,
    autocast_dtype: torch.dtype | None = None,
    torch_compile: bool = False,
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
) -> Networks:
    """Prepares `vae` for training, on the device it is on and in channels-last memory.

    Args:
        vae: with weights in float32; its encoder's will require gradients, its decoder's will not.
        loss: of reconstructions, on the same device.
        autocast_dtype: precision of the networks; None for float32.
        torch_compile: compile the passes that are repeated: encoder, decoder, and LPIPS's trunk.
        wrap: makes the module whose forward and backward pass join the processes.
    """
    vae.to(memory_format=torch.channels_last).requires_grad_(False)
    if torch_compile:
        with_compilable_layers(vae)
    encoder = LatentEncoder(vae, autocast_dtype=autocast_dtype)
    reference = frozen_copy(encoder)
    decoder = frozen_copy(LatentDecoder(vae, autocast_dtype=autocast_dtype), with_merged_upsampling)
    wrapped_encoder = wrap(encoder.requires_grad_(True).train())
    mirror = EncoderMirror(encoder)  # of the wrapped one: DistributedDataParallel moves the weights
    attacked_loss = loss
    if loss.perceptual is not None and autocast_dtype is not None:
        attacked_loss = ReconstructionLoss(loss.perceptual.in_precision(autocast_dtype), weight=loss.weight)
    if torch_compile:
        for module in (encoder, mirror.encoder, reference, decoder):
            module.compile(dynamic=False)
        for each in {loss.perceptual, attacked_loss.perceptual}:
            if each is not None:
                each.compile_features()
    return Networks(
        vae=vae,
        encoder=encoder,
        wrapped_encoder=wrapped_encoder,
        mirror=mirror,
        decoder=decoder,
        reference=reference,
        loss=loss,
        attacked_loss=attacked_loss,
    )


@dataclass(frozen=True, kw_only=True)
class Step:
    """The settings of a step; `loss` computes it."""

    networks: Networks
    attack: PGDConfig
    originality_weight: float = 0.01
    """alpha; with 0 the clean images are not encoded at all."""
    latent_scale: float | Tensor = 1.0
    """Multiplies latents before originality is measured: 1 for raw ones, or `LatentScale.factor` for the denoiser's."""
    sample_posterior: bool = False
    attack_batch_size: int | None = None
    """Images attacked at a time; None for all. Fewer take less memory, and change nothing else."""
    noise: float = 0.0
    """Above 0, the standard deviation of white noise that takes the attack's place, in units of a [0,1] image."""

    def loss(self, images: Tensor, generators: Generators) -> tuple[Tensor, Tensor]:
        """L_robust + alpha L_orig, averaged over a batch.

        Args:
            images: clean, `[N,3,H,W]` in [-1,1], on any device.
            generators: one CPU generator per image, of the attack's start and the posterior's noise.

        Returns:
            The loss, of which `backward` gives the encoder its gradients, and `TERMS` as a vector.
        """
        networks = self.networks
        networks.mirror.refresh()
        clean = images.to(networks.device, memory_format=torch.channels_last, non_blocking=True)
        target = networks.loss.target(clean)
        noise = self._latent_noise(clean, generators) if self.sample_posterior else None
        adversarial = self._perturbed(clean, target, noise, generators)
        latents, originality = self._encode(adversarial, clean, noise)
        terms = networks.loss.terms(networks.decoder(latents), target)
        robust = terms.mse + networks.loss.weight * terms.lpips
        loss = (robust + self.originality_weight * originality).mean()
        attacked_psnr = -10 * torch.log10(terms.mse / PIXEL_RANGE**2)
        values = (loss, terms.mse.mean(), terms.lpips.mean(), originality.mean(), attacked_psnr.mean())
        return loss, torch.stack([value.detach() for value in values])

    def _perturbed(self, clean: Tensor, target: Target, noise: Tensor | None, generators: Generators) -> Tensor:
        if self.noise:
            return gaussian_noise(clean, self.noise, generators=generators)
        size = self.attack_batch_size or len(clean)
        parts = []
        for start in range(0, len(clean), size):
            stop = min(start + size, len(clean))
            objective = self._objective(target.part(start, stop), None if noise is None else noise[start:stop])
            parts.append(pgd(objective, clean[start:stop], self.attack, generators=generators[start:stop]))
        return torch.cat(parts)

    def _objective(self, target: Target, noise: Tensor | None) -> Callable[[Tensor], Tensor]:
        networks = self.networks

        def objective(images: Tensor) -> Tensor:
            latents = split_moments(networks.mirror.encoder(images)).latent(noise)
            return networks.attacked_loss(networks.decoder(latents), target)

        return objective

    def _encode(self, adversarial: Tensor, clean: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """Latents of the attacked images, and the originality `[N]` of the clean ones.

        One pass through the wrapper for both: its backward pass averages over the processes.
        """
        networks = self.networks
        if self.originality_weight == 0:
            return split_moments(networks.wrapped_encoder(adversarial)).latent(noise), clean.new_zeros(len(clean))
        both = split_moments(networks.wrapped_encoder(torch.cat([adversarial, clean])))
        attacked, undisturbed = (Moments(*part) for part in zip(*(half.chunk(2) for half in both), strict=True))
        with torch.no_grad():
            reference = split_moments(networks.reference(clean))
        return attacked.latent(noise), originality_loss(*undisturbed, *reference, scale=self.latent_scale)

    def _latent_noise(self, clean: Tensor, generators: Generators) -> Tensor:
        """One sample of the posterior's noise per image, kept through its attack: `[N,C,h,w]`."""
        shape = latent_shape(self.networks.vae.config, clean.shape[-1])
        return draw(torch.randn, shape, generators, like=clean)
