"""Encode and decode with a VAE of any diffusers class that an evaluation compares."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from srl_utils.vae.latents import LatentScale
from srl_utils.vae.loading import AutoencoderSource, load_autoencoder
from srl_utils.vae.networks import LatentDecoder, LatentEncoder, Moments, split_moments, to_channels_last
from srl_utils.vae.tokens import Codebook, codebook_of


@dataclass(frozen=True)
class Codec:
    """A VAE under judgement.

    Attributes:
        name: its name in the results.
        vae: the model itself, as pipelines take it.
        encoder: maps images to raw moments.
        decoder: maps raw latents to images.
    """

    name: str
    vae: ModelMixin
    encoder: nn.Module
    decoder: nn.Module

    @classmethod
    def of(cls, vae: ModelMixin, name: str, *, autocast_dtype: torch.dtype | None = None) -> Codec:
        """Return the codec of a VAE of any class in `FAMILIES`, in its own precision or within autocast."""
        encoder = LatentEncoder(vae, autocast_dtype=autocast_dtype)
        return cls(name, vae, encoder, LatentDecoder(vae, autocast_dtype=autocast_dtype))

    @cached_property
    def digest(self) -> str:
        """Return a digest of the weights. VAEs with equal weights have equal digests."""
        state = sha256()
        for tensor in self.vae.state_dict().values():
            state.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return state.hexdigest()[:16]

    @property
    def bare(self) -> Codec:
        """Return the VAE alone, if this is one with a purifier in front."""
        return self

    @property
    def random(self) -> bool:
        """Return whether equal images may have unequal latents, because a purifier draws."""
        return False

    @property
    def exposed(self) -> Codec:
        """Return what an adaptive attacker can compute gradients of: this one, or the VAE alone."""
        return self

    def purified(self, images: Tensor) -> Tensor:
        """Return images as the encoder sees them; a VAE alone takes them as they are."""
        return images

    def drawing(self, generators: Sequence[torch.Generator]) -> AbstractContextManager[None]:
        """Return a context in which image i of a batch is purified with `generators[i]`; a VAE alone draws nothing."""
        return nullcontext()

    @property
    def device(self) -> torch.device:
        return next(self.decoder.parameters()).device

    @property
    def codebook(self) -> Codebook | None:
        """Return the codes of discrete latents; None for continuous ones."""
        return codebook_of(self.vae)

    def moments(self, images: Tensor) -> Moments:
        return split_moments(self.encoder(images))

    def encode(self, images: Tensor) -> Tensor:
        """Return the raw latents of images: the posterior's mean."""
        return self.moments(images).mean

    def reconstruct(self, images: Tensor) -> Tensor:
        return self.decoder(self.encode(images))

    def scale(self, latents: Tensor, pipe: DiffusionPipeline | None = None) -> Tensor:
        """Return raw latents `[N,C,h,w]` as the denoiser of `pipe` sees them, or as the VAE's configuration says."""
        return LatentScale.of(self.vae, pipe).scale(latents)


def load_codec(
    name: str, source: AutoencoderSource, *, device: torch.device, autocast_dtype: torch.dtype | None = None
) -> Codec:
    """Load a VAE of any class in `FAMILIES`, frozen, in float32 or within autocast.

    Raises:
        UserError: a ValueError, if it is of another class or cannot be loaded; see `load_autoencoder`.
    """
    return frozen_codec(load_autoencoder(source), name, device=device, autocast_dtype=autocast_dtype)


def frozen_codec(
    vae: ModelMixin, name: str, *, device: torch.device, autocast_dtype: torch.dtype | None = None
) -> Codec:
    """Freeze a VAE, move it in place to `device` and channels-last memory, and return its codec."""
    to_channels_last(vae.to(device)).requires_grad_(False).eval()
    return Codec.of(vae, name, autocast_dtype=autocast_dtype)
