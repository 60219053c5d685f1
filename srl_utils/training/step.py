"""The loss of one SRL-VAE step (arXiv 2504.17219), computed fast.

For images x, the encoder E being trained, its frozen original E0 and the frozen decoder D:

    delta     = argmax over |delta| <= epsilon of  MSE(D(E(x + delta)), x) + lambda LPIPS(D(E(x + delta)), x)
    L_robust  = MSE(D(E(x + delta)), x) + lambda LPIPS(D(E(x + delta)), x)
    L_orig    = |mean E(x) - mean E0(x)|^2 + |variance E(x) - variance E0(x)|^2
    loss      = L_robust + alpha L_orig

Beyond the paper, a share of the images may be attacked where a denoiser sees it, on the latents, and their distance may be in
the loss with a weight beta:

    delta     = argmax over |delta| <= epsilon of  L_latent = |mean E(x + delta) - mean E0(x)|^2
    loss      = L_robust + alpha L_orig + beta L_latent

Rivals have other objectives (`OBJECTIVES`). "feature" decodes nothing, as arXiv 2402.12336 (FARE) and 2602.18252 do.
"trades" keeps the latents of attacked images at those of the same encoder (Zhang et al., ICML 2019, equation 5). "purify"
undoes attacks on the original VAE, as CAT does for images that are protected (arXiv 2502.07225), but with the clean image as
the target. "equivariance" attacks nothing: a random scaling and rotation tau of the latents has to do to the reconstruction
what it does to the image, as in EQ-VAE (arXiv 2502.09509), whose decoder is trained as well:

    feature:       delta = argmax L_latent                                 loss = L_latent + alpha L_orig
    trades:        delta = argmax  C = |mean E(x + delta) - mean E(x)|^2   loss = L(D(E(x)), x) + beta C + alpha L_orig
    purify:        delta = argmax L(D(E0(x + delta)), x)                   loss = as above
    equivariance:  no delta                                                loss = L(D(tau E(x)), tau x) + alpha L_orig

with L = MSE + lambda LPIPS.

`benchmarks/textbook.py` computes the same plainly, and a test compares both. What makes this one faster changes results by
rounding alone: the attack differentiates with respect to the images only, through a frozen mirror of the encoder; frozen
weights are kept in the precision they run in, including LPIPS's in the attack; features of the clean images are computed
once; clean and attacked images share one pass; nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from srl_utils.attacks.corruptions import gaussian_noise
from srl_utils.attacks.draws import Generators, draw
from srl_utils.attacks.gradient import PGDConfig, pgd
from srl_utils.images.pixels import PIXEL_RANGE, on_device
from srl_utils.metrics.losses import (
    ReconstructionLoss,
    ReconstructionTerms,
    Target,
    mean_squared_error,
    originality_loss,
)
from srl_utils.training.objectives import OBJECTIVES, Objective
from srl_utils.training.similarities import Similarity, draw_similarities, members
from srl_utils.vae.latents import RAW, LatentScale
from srl_utils.vae.layers import with_compilable_layers, with_merged_upsampling
from srl_utils.vae.low_rank import add_low_rank_updates
from srl_utils.vae.networks import (
    EncoderMirror,
    LatentDecoder,
    LatentEncoder,
    Moments,
    downsampling_factor,
    frozen_copy,
    latent_shape,
    split_moments,
    to_channels_last,
)


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

    @property
    def trained(self) -> list[nn.Parameter]:
        """Return the parameters that are trained: the encoder's, or those of its low-rank updates."""
        return [parameter for parameter in self.encoder.parameters() if parameter.requires_grad]


def build_networks(
    vae: ModelMixin,
    loss: ReconstructionLoss,
    *,
    autocast_dtype: torch.dtype | None = None,
    torch_compile: bool = False,
    lora_rank: int | None = None,
    seed: int = 0,
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
) -> Networks:
    """Prepare `vae` for training, on its device and in channels-last memory where its class allows that.

    Args:
        vae: in float32. Afterwards only its encoder, or the low-rank updates of that, require gradients.
        loss: compares reconstructions with images; on the same device.
        autocast_dtype: precision of the networks; None for float32.
        torch_compile: compile encoder, decoder and LPIPS's trunk.
        lora_rank: of the updates to which the training is restricted; None trains the encoder's weights themselves.
        seed: of the low-rank updates' start.
        wrap: wraps the encoder for several processes, as `Accelerator.prepare_model` does.
    """
    to_channels_last(vae).requires_grad_(False)
    if torch_compile:
        with_compilable_layers(vae)
    encoder = LatentEncoder(vae, autocast_dtype=autocast_dtype)
    reference = frozen_copy(encoder)
    decoder = frozen_copy(LatentDecoder(vae, autocast_dtype=autocast_dtype), with_merged_upsampling)
    if lora_rank is None:
        encoder.requires_grad_(True)
    else:
        add_low_rank_updates(encoder, lora_rank, seed=seed)
    wrapped_encoder = wrap(encoder.train())
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
    target: Target | None
    """The images as the reconstruction loss compares with them; None if it compares with transformed ones."""
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
    similarities: Sequence[Similarity] = ()
    """Transformation of each image and of its latents, if the loss compares transformed ones."""

    def part(self, start: int, stop: int) -> CleanBatch:
        """Return what an attack on the images `start` to `stop` needs."""
        return CleanBatch(
            images=self.images[start:stop],
            target=None if self.target is None else self.target.part(start, stop),
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
    objective: Objective = OBJECTIVES["srl"]
    originality_weight: float = 0.01
    """alpha."""
    latent_weight: float = 0.0
    """beta, weight of the distance of attacked images' latents, for objectives that leave a choice."""
    latent_attack_share: float = 0.0
    """Share of the images whose attack maximises that distance instead of the reconstruction loss, likewise."""
    latent_scale: LatentScale = RAW
    """In which distances of latents are measured; by default that of raw ones."""
    sample_posterior: bool = False
    """Sample the latents that are decoded instead of taking the posterior's mean."""
    attack_batch_size: int | None = None
    """Images attacked at a time, to save memory; None for all. Results do not depend on it."""
    noise: float = 0.0
    """Standard deviation of white noise in place of the attack, units of a [0,1] image; 0 for the attack."""

    @property
    def terms(self) -> tuple[str, ...]:
        """Return the names of the values that `loss` returns beside the loss."""
        return self.objective.terms

    def __call__(self, images: Tensor, generators: Generators) -> tuple[Tensor, Tensor]:
        """Return `loss` of attacked `images`, as the training script computes it."""
        clean = self.batch(images, generators)
        return self.loss(self.attack(clean), clean)

    def batch(self, images: Tensor, generators: Generators, positions: Sequence[int] | None = None) -> CleanBatch:
        """Move clean images to the device and prepare what attack and loss need.

        Args:
            images: `[N,3,H,W]` in [-1,1], on any device.
            generators: one CPU generator per image, for the attack's start, the posterior's noise and transformations.
            positions: of the images in the training, which decide what is attacked of each; by default from 0.

        Returns:
            The images, those first that are attacked on their latents.
        """
        networks = self.networks
        order, latent_attacks = latents_first(range(len(images)) if positions is None else positions, self._latent_share)
        clean, generators = in_order(on_device(images, networks.device), order), [generators[i] for i in order]
        transformed = self.objective.decodes == "transformed"
        anchored = self.objective.anchor == "original" and (self._beta > 0 or self._latent_share > 0)
        reference = None
        if self.originality_weight or anchored:
            with torch.no_grad():
                reference = split_moments(networks.reference(clean))
        noise = self._latent_noise(clean, reference, generators) if self.sample_posterior else None
        side = clean.shape[-1] // downsampling_factor(networks.vae)
        return CleanBatch(
            images=clean,
            target=None if transformed else networks.loss.target(clean),
            latent_noise=noise,
            generators=generators,
            reference=reference,
            anchor=reference.mean if reference is not None and anchored else None,
            latent_attacks=latent_attacks,
            similarities=draw_similarities(generators, side) if transformed else (),
        )

    def attack(self, clean: CleanBatch) -> Tensor:
        """Return the attacked images `[N,3,H,W]`: x + delta, with delta = argmax of the reconstruction or latent loss.

        With `noise`, return the images with white noise instead; with an objective without an attack, as they are.
        """
        if self.objective.victim is None:
            return clean.images
        self.networks.mirror.refresh()
        if self.noise:
            return gaussian_noise(clean.images, self.noise, generators=clean.generators)
        if self.objective.anchor == "trained":
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
        zero = attacked.new_zeros(())
        values = {"originality": zero, "latent": zero}
        if self.originality_weight:
            values["originality"] = self._originality(undisturbed, clean).mean()
        if self._beta:
            anchor = undisturbed.mean if self.objective.anchor == "trained" else clean.anchor
            values["latent"] = self._latent_loss(disturbed.mean, anchor).mean()
        if self.objective.decodes is not None:
            decoded = disturbed if self.objective.decodes == "attacked" else undisturbed
            mse, lpips = self._reconstruction_terms(decoded.latent(clean.latent_noise), clean)
            psnr = -10 * torch.log10(mse / PIXEL_RANGE**2)
            values |= {"mse": mse.mean(), "lpips": lpips.mean(), "attacked_psnr": psnr.mean()}
        loss = sum((weight * values[name] for name, weight in self._weights.items()), zero)
        values["loss"] = loss
        return loss, torch.stack([values[name].detach() for name in self.terms])

    @property
    def _weights(self) -> dict[str, float]:
        """Return the weight of each term of the loss."""
        weights = {"originality": self.originality_weight, "latent": self._beta}
        if self.objective.decodes is not None:
            weights |= {"mse": 1.0, "lpips": self.networks.loss.weight}
        return weights

    @property
    def _beta(self) -> float:
        return self.objective.latent_weight(self.latent_weight)

    @property
    def _latent_share(self) -> float:
        return self.objective.latent_share(self.latent_attack_share)

    @property
    def _victim(self) -> LatentEncoder:
        """Return the frozen encoder that the attack differentiates through."""
        return self.networks.reference if self.objective.victim == "original" else self.networks.mirror.encoder

    def _pgd(self, clean: CleanBatch) -> Tensor:
        on_latents, on_images = self._split(clean)

        def loss(images: Tensor) -> Tensor:
            posterior = split_moments(self._victim(images))
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
        assert clean.target is not None  # an objective with an attack does not transform
        return self.networks.attacked_loss(self.networks.decoder(posterior.latent(clean.latent_noise)), clean.target)

    def _reconstruction_terms(self, latents: Tensor, clean: CleanBatch) -> ReconstructionTerms:
        """Return the terms of the reconstruction loss, each `[N]`; if images are transformed, in the order of `members`."""
        decoder, loss = self.networks.decoder, self.networks.loss
        if clean.target is not None:
            return loss.terms(decoder(latents), clean.target)
        parts = []
        for similarity, numbers in members(clean.similarities).items():
            # A list as an index would be copied to the device, which waits for it.
            own_latents, own_images = (torch.stack([each[i] for i in numbers]) for each in (latents, clean.images))
            parts.append(loss.terms(decoder(similarity(own_latents)), loss.target(similarity(own_images))))
        return ReconstructionTerms(*(torch.cat(part) for part in zip(*parts, strict=True)))

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
        """Return the posteriors of the attacked and of the clean images; one that nothing needs is the other.

        Both take one pass through the wrapper, whose backward pass averages gradients over the processes.
        """
        without_attack = self.objective.victim is None
        needed = [] if without_attack else [attacked]
        if without_attack or self.originality_weight or self.objective.decodes == "clean":
            needed.append(clean.images)
        moments = split_moments(self.networks.wrapped_encoder(torch.cat(needed)))
        parts = [Moments(*part) for part in zip(*(each.chunk(len(needed)) for each in moments), strict=True)]
        return parts[0], parts[-1]

    def _latent_noise(self, clean: Tensor, reference: Moments | None, generators: Generators) -> Tensor:
        """Return one sample of the posterior's noise per image: `[N,C,h,w]`."""
        shape = latent_shape(self.networks.reference, clean) if reference is None else reference.mean.shape[1:]
        return draw(torch.randn, shape, generators, like=clean)


def latents_first(positions: Sequence[int], share: float) -> tuple[list[int], int]:
    """Return the order in which images that are attacked on their latents come first, and their number.

    Of all images of a training in a row, a `share` is, evenly spread; batches and processes make no difference.

    Args:
        positions: of a batch's images in the training, from 0.
        share: from 0 to 1.
    """
    chosen = [ceil((position + 1) * share) > ceil(position * share) for position in positions]
    return sorted(range(len(chosen)), key=lambda index: not chosen[index]), sum(chosen)


def in_order(images: Tensor, order: Sequence[int]) -> Tensor:
    """Return images in another order, in the same memory layout."""
    if list(order) == sorted(order):
        return images
    # A list as an index would be copied to the device, which waits for it.
    return on_device(torch.stack([images[index] for index in order]), images.device)
