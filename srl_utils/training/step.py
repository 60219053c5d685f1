"""The loss of one SRL-VAE step (arXiv 2504.17219), computed fast.

For images x, the encoder E being trained, its frozen original E0 and the frozen decoder D:

    delta     = argmax over |delta| <= epsilon of  MSE(D(E(x + delta)), x) + lambda LPIPS(D(E(x + delta)), x)
    L_robust  = MSE(D(E(x + delta)), x) + lambda LPIPS(D(E(x + delta)), x)
    L_orig    = |mean E(x) - mean E0(x)|^2 + |variance E(x) - variance E0(x)|^2
    loss      = L_robust + alpha L_orig

Beyond the paper, a share of a batch may be attacked where a denoiser sees it, on the latents, and their distance may be in
the loss with a weight beta:

    delta     = argmax over |delta| <= epsilon of  L_latent = |mean E(x + delta) - mean E0(x)|^2
    loss      = L_robust + alpha L_orig + beta L_latent

Two rivals have other objectives. "feature" decodes nothing, as arXiv 2402.12336 (FARE) and 2602.18252 do; "trades" keeps
the latents of attacked images at those of the same encoder (Zhang et al., ICML 2019, equation 5):

    feature:    delta = argmax L_latent                                 loss = L_latent + alpha L_orig
    trades:     delta = argmax  C = |mean E(x + delta) - mean E(x)|^2   loss = L(D(E(x)), x) + beta C + alpha L_orig

`benchmarks/textbook.py` computes the same plainly, and a test compares both. What makes this one faster changes results by
rounding alone: the attack differentiates with respect to the images only, through a frozen mirror of the encoder; frozen
weights are kept in the precision they run in, including LPIPS's in the attack; features of the clean images are computed
once; clean and attacked images share one pass; nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from srl_utils.attacks.corruptions import gaussian_noise
from srl_utils.attacks.draws import Generators, draw
from srl_utils.attacks.gradient import PGDConfig, pgd
from srl_utils.images.pixels import PIXEL_RANGE, on_device
from srl_utils.metrics.losses import ReconstructionLoss, Target, mean_squared_error, originality_loss
from srl_utils.vae.latents import RAW, LatentScale
from srl_utils.vae.layers import with_compilable_layers, with_merged_upsampling
from srl_utils.vae.networks import (
    EncoderMirror,
    LatentDecoder,
    LatentEncoder,
    Moments,
    frozen_copy,
    latent_shape,
    split_moments,
    to_channels_last,
)

TERMS = ("loss", "originality", "latent", "mse", "lpips", "attacked_psnr")
"""Values of a batch, in this order: mean loss, its four unweighted terms, and PSNR under attack in dB."""
TrainingObjective = Literal["srl", "feature", "trades"]
OBJECTIVES: tuple[TrainingObjective, ...] = get_args(TrainingObjective)
MEASURED: dict[TrainingObjective, tuple[str, ...]] = {"srl": TERMS, "feature": TERMS[:3], "trades": TERMS[:5]}
"""The values that an objective has: `feature` decodes nothing, `trades` only clean images."""


@dataclass(frozen=True, kw_only=True)
class Networks:
    """The parts of a VAE that the step uses."""

    vae: ModelMixin
    """Its encoder is trained in place, in float32; its decoder is frozen."""
    encoder: LatentEncoder
    wrapped_encoder: nn.Module
    """The encoder inside DistributedDataParallel; calls that are differentiated go through it."""
    mirror: EncoderMirror
    decoder: LatentDecoder
    reference: LatentEncoder
    loss: ReconstructionLoss
    attacked_loss: ReconstructionLoss
    """Loss that the attack maximises: `loss`, with LPIPS's trunk in the precision of the networks."""

    @property
    def device(self) -> torch.device:
        return next(self.decoder.parameters()).device


def build_networks(
    vae: ModelMixin,
    loss: ReconstructionLoss,
    *,
    autocast_dtype: torch.dtype | None = None,
    torch_compile: bool = False,
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
) -> Networks:
    """Prepare `vae` for training, on its device and in channels-last memory where its class allows that.

    Args:
        vae: in float32. Afterwards only its encoder requires gradients.
        loss: compares reconstructions with images; on the same device.
        autocast_dtype: precision of the networks; None for float32.
        torch_compile: compile encoder, decoder and LPIPS's trunk.
        wrap: wraps the encoder for several processes, as `Accelerator.prepare_model` does.
    """
    to_channels_last(vae).requires_grad_(False)
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
class CleanBatch:
    """Clean images on the device, and everything about them that attack and loss share."""

    images: Tensor
    """`[N,3,H,W]` in [-1,1], in channels-last memory."""
    target: Target
    """The images as the reconstruction loss compares with them."""
    latent_noise: Tensor | None
    """Noise of the posterior `[N,C,h,w]`, kept through the attack; None to take its mean."""
    generators: Generators
    """One CPU generator per image."""
    reference: Moments | None = None
    """The original encoder's posterior of the images; None if nothing needs it."""
    anchor: Tensor | None = None
    """Latents `[N,C,h,w]` that those of attacked images should not leave; None if nothing needs them."""
    latent_attacks: int = 0
    """The first so many images are attacked on their latents, the others on their reconstructions."""

    def part(self, start: int, stop: int) -> CleanBatch:
        """Return what an attack on the images `start` to `stop` needs."""
        return CleanBatch(
            images=self.images[start:stop],
            target=self.target.part(start, stop),
            latent_noise=None if self.latent_noise is None else self.latent_noise[start:stop],
            generators=self.generators[start:stop],
            anchor=None if self.anchor is None else self.anchor[start:stop],
            latent_attacks=min(max(self.latent_attacks - start, 0), stop - start),
        )


@dataclass(frozen=True, kw_only=True)
class Step:
    """Attack and loss of a training step: `batch`, then `attack`, then `loss`."""

    networks: Networks
    pgd: PGDConfig
    objective: TrainingObjective = "srl"
    originality_weight: float = 0.01
    """alpha."""
    latent_weight: float = 0.0
    """beta, weight of the distance of attacked images' latents; `feature` has no use for it."""
    latent_attack_share: float = 0.0
    """Share of a batch, rounded, whose attack maximises that distance instead of the reconstruction loss; for `srl`."""
    latent_scale: LatentScale = RAW
    """In which distances of latents are measured; by default that of raw ones."""
    sample_posterior: bool = False
    """Sample the latent of an attacked image instead of taking the posterior's mean."""
    attack_batch_size: int | None = None
    """Images attacked at a time, to save memory; None for all. Results do not depend on it."""
    noise: float = 0.0
    """Standard deviation of white noise in place of the attack, units of a [0,1] image; 0 for the attack."""

    @property
    def terms(self) -> tuple[str, ...]:
        """Return the names of what `loss` returns beside the loss: those of `TERMS` that the objective has."""
        return MEASURED[self.objective]

    def __call__(self, images: Tensor, generators: Generators) -> tuple[Tensor, Tensor]:
        """Return `loss` of attacked `images`, as the training script computes it."""
        clean = self.batch(images, generators)
        return self.loss(self.attack(clean), clean)

    def batch(self, images: Tensor, generators: Generators) -> CleanBatch:
        """Move clean images to the device and prepare what attack and loss need.

        Args:
            images: `[N,3,H,W]` in [-1,1], on any device.
            generators: one CPU generator per image, for the attack's start and the posterior's noise.
        """
        networks = self.networks
        clean = on_device(images, networks.device)
        target = networks.loss.target(clean)
        reference = None
        if self.originality_weight or (self.objective != "trades" and (self._beta or self._latent_share)):
            with torch.no_grad():
                reference = split_moments(networks.reference(clean))
        noise = self._latent_noise(clean, reference, generators) if self.sample_posterior else None
        return CleanBatch(
            images=clean,
            target=target,
            latent_noise=noise,
            generators=generators,
            reference=reference,
            anchor=None if reference is None or self.objective == "trades" else reference.mean,
            latent_attacks=round(self._latent_share * len(clean)),
        )

    def attack(self, clean: CleanBatch) -> Tensor:
        """Return the attacked images `[N,3,H,W]`: x + delta, with delta = argmax of the reconstruction or latent loss.

        With `noise`, return the images with white noise instead.
        """
        self.networks.mirror.refresh()
        if self.noise:
            return gaussian_noise(clean.images, self.noise, generators=clean.generators)
        if self.objective == "trades":
            with torch.no_grad():
                clean = replace(clean, anchor=split_moments(self.networks.mirror.encoder(clean.images)).mean)
        size = self.attack_batch_size or len(clean.images)
        starts = range(0, len(clean.images), size)
        return torch.cat([self._pgd(clean.part(start, min(start + size, len(clean.images)))) for start in starts])

    def loss(self, attacked: Tensor, clean: CleanBatch) -> tuple[Tensor, Tensor]:
        """Return the objective's loss, such as L_robust + alpha L_orig + beta L_latent, averaged over a batch.

        Args:
            attacked: images that the encoder sees, `[N,3,H,W]` in [-1,1].
            clean: the images that their reconstructions are compared with.

        Returns:
            The loss, whose `backward` gives the encoder its gradients, and `terms` as a vector.
        """
        disturbed, undisturbed = self._encode(attacked, clean)
        anchor = undisturbed.mean if self.objective == "trades" else clean.anchor
        zeros = attacked.new_zeros(len(attacked))
        originality = self._originality(undisturbed, clean) if self.originality_weight else zeros
        latent = self._latent_loss(disturbed.mean, anchor) if self._beta else zeros
        values = [originality, latent]
        loss = self.originality_weight * originality + self._beta * latent
        if self.objective != "feature":
            decoded = undisturbed if self.objective == "trades" else disturbed
            reconstruction = self.networks.decoder(decoded.latent(clean.latent_noise))
            mse, lpips = self.networks.loss.terms(reconstruction, clean.target)
            values += [mse, lpips, -10 * torch.log10(mse / PIXEL_RANGE**2)]
            loss = mse + self.networks.loss.weight * lpips + loss
        mean = loss.mean()
        means = [mean.detach(), *(value.detach().mean() for value in values)]
        return mean, torch.stack(means[: len(self.terms)])

    @property
    def _beta(self) -> float:
        return 1.0 if self.objective == "feature" else self.latent_weight

    @property
    def _latent_share(self) -> float:
        return self.latent_attack_share if self.objective == "srl" else 1.0

    def _pgd(self, clean: CleanBatch) -> Tensor:
        on_latents, on_images = self._split(clean)

        def loss(images: Tensor) -> Tensor:
            posterior = split_moments(self.networks.mirror.encoder(images))
            count = len(on_latents.images)
            if count == 0:
                return self._attacked_loss(posterior, clean)
            latent = self._latent_loss(posterior.mean[:count], on_latents.anchor)
            if count == len(images):
                return latent
            rest = Moments(*(each[count:] for each in posterior))
            return torch.cat([latent, self._attacked_loss(rest, on_images)])

        return pgd(loss, clean.images, self.pgd, generators=clean.generators)

    @staticmethod
    def _split(clean: CleanBatch) -> tuple[CleanBatch, CleanBatch]:
        """Return the images that are attacked on their latents, and those on their reconstructions."""
        return clean.part(0, clean.latent_attacks), clean.part(clean.latent_attacks, len(clean.images))

    def _attacked_loss(self, posterior: Moments, clean: CleanBatch) -> Tensor:
        """Return the reconstruction loss that the attack maximises, `[N]`."""
        return self.networks.attacked_loss(self.networks.decoder(posterior.latent(clean.latent_noise)), clean.target)

    def _latent_loss(self, latents: Tensor, anchor: Tensor | None) -> Tensor:
        """Return L_latent, `[N]`: the mean squared distance of latents from their anchor."""
        assert anchor is not None  # `batch` or `attack` has made it, as a weight or a share asks for it
        factor = self.latent_scale.factor_for(latents)
        return mean_squared_error(factor * latents, factor * anchor)

    def _originality(self, posterior: Moments, clean: CleanBatch) -> Tensor:
        """Return L_orig, `[N]`, of the clean images' posterior."""
        assert clean.reference is not None
        return originality_loss(*posterior, *clean.reference, scale=self.latent_scale.factor_for(posterior.mean))

    def _encode(self, attacked: Tensor, clean: CleanBatch) -> tuple[Moments, Moments]:
        """Return the posteriors of the attacked and of the clean images. If nothing needs the second, return the first twice.

        Both take one pass through the wrapper, whose backward pass averages gradients over the processes.
        """
        encoder = self.networks.wrapped_encoder
        if self.originality_weight == 0 and self.objective != "trades":
            posterior = split_moments(encoder(attacked))
            return posterior, posterior
        both = split_moments(encoder(torch.cat([attacked, clean.images])))
        disturbed, undisturbed = (Moments(*part) for part in zip(*(half.chunk(2) for half in both), strict=True))
        return disturbed, undisturbed

    def _latent_noise(self, clean: Tensor, reference: Moments | None, generators: Generators) -> Tensor:
        """Return one sample of the posterior's noise per image: `[N,C,h,w]`."""
        shape = latent_shape(self.networks.reference, clean) if reference is None else reference.mean.shape[1:]
        return draw(torch.randn, shape, generators, like=clean)
