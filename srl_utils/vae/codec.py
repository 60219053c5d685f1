"""Encode and decode with a VAE of any diffusers class that an evaluation compares."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256

import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    AutoencoderTiny,
    DiffusionPipeline,
    ModelMixin,
    VQModel,
)
from torch import Tensor, nn

from srl_utils.vae.latents import LatentScale
from srl_utils.vae.loading import AutoencoderSource, load_autoencoder, read_config
from srl_utils.vae.networks import Moments, autocast, split_moments

KINDS = (AutoencoderKL, AsymmetricAutoencoderKL, AutoencoderKLTemporalDecoder, AutoencoderTiny, VQModel)
NO_VARIANCE = -30.0
"""The log-variance of an encoder without a posterior: the lowest that diffusers allows."""


@dataclass(frozen=True)
class Codec:
    """A VAE under judgement.

    Attributes:
        name: its name in the results.
        vae: the model itself, as pipelines take it.
        encoder: maps images `[N,3,H,W]` in [-1,1] to raw moments `[N,2C,h,w]`.
        decoder: maps raw latents `[N,C,h,w]` to images.
    """

    name: str
    vae: ModelMixin
    encoder: nn.Module
    decoder: nn.Module

    @classmethod
    def of(cls, vae: ModelMixin, name: str, *, autocast_dtype: torch.dtype | None = None) -> Codec:
        """Return the codec of a VAE of any of `KINDS`, in its own precision or within autocast."""
        return cls(name, vae, AnyEncoder(vae, autocast_dtype), AnyDecoder(vae, autocast_dtype))

    @cached_property
    def digest(self) -> str:
        """Return a digest of the weights. VAEs with equal weights have equal digests."""
        state = sha256()
        for module in (self.encoder, self.decoder):
            for tensor in module.state_dict().values():
                state.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return state.hexdigest()[:16]

    @property
    def device(self) -> torch.device:
        return next(self.decoder.parameters()).device

    def moments(self, images: Tensor) -> Moments:
        return split_moments(self.encoder(images))

    def encode(self, images: Tensor) -> Tensor:
        """Return the raw latents of images: the posterior's mean."""
        return self.moments(images).mean

    def reconstruct(self, images: Tensor) -> Tensor:
        return self.decoder(self.encode(images))

    def scale(self, latents: Tensor, pipe: DiffusionPipeline | None = None) -> Tensor:
        """Return raw latents `[N,C,h,w]` as the denoiser of `pipe` sees them, or as the VAE's configuration says."""
        return LatentScale.of(self.vae.config, pipe).scale(latents)


def load_codec(
    name: str, source: AutoencoderSource, *, device: torch.device, autocast_dtype: torch.dtype | None = None
) -> Codec:
    """Load a VAE of any of `KINDS`, frozen, in float32 or within autocast.

    Raises:
        UserError: a ValueError, if it is of no class in `KINDS` or cannot be loaded; see `read_config` and
            `load_autoencoder`.
    """
    config = read_config(source, KINDS)
    kind = next(known for known in KINDS if known.__name__ == config["_class_name"])
    return frozen_codec(load_autoencoder(source, kind), name, device=device, autocast_dtype=autocast_dtype)


def frozen_codec(
    vae: ModelMixin, name: str, *, device: torch.device, autocast_dtype: torch.dtype | None = None
) -> Codec:
    """Freeze a VAE, move it in place to `device` and channels-last memory, and return its codec."""
    vae.to(device).requires_grad_(False).eval()
    if not isinstance(vae, AutoencoderKLTemporalDecoder):  # its weights have five dimensions
        vae.to(memory_format=torch.channels_last)
    return Codec.of(vae, name, autocast_dtype=autocast_dtype)


class AnyEncoder(nn.Module):
    """Encodes images to moments with a VAE of any of `KINDS`; without a posterior the variance is nearly 0."""

    def __init__(self, vae: ModelMixin, autocast_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.vae = vae
        self.autocast_dtype = autocast_dtype

    def forward(self, images: Tensor) -> Tensor:
        with autocast(images, self.autocast_dtype):
            output = self.vae.encode(images)
        if hasattr(output, "latent_dist"):
            return output.latent_dist.parameters.float()
        latents = output.latents.float()
        return torch.cat([latents, torch.full_like(latents, NO_VARIANCE)], dim=1)


class AnyDecoder(nn.Module):
    """Decodes latents with a VAE of any of `KINDS`; a video decoder decodes single frames."""

    def __init__(self, vae: ModelMixin, autocast_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.vae = vae
        self.autocast_dtype = autocast_dtype
        self.settings = {"num_frames": 1} if isinstance(vae, AutoencoderKLTemporalDecoder) else {}

    def forward(self, latents: Tensor) -> Tensor:
        with autocast(latents, self.autocast_dtype):
            return self.vae.decode(latents, **self.settings).sample.float()
