"""Split an `AutoencoderKL` into what the method needs: a trainable encoder, a frozen decoder, a frozen reference."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from srl_utils.errors import UserError
from srl_utils.vae.precision import full_precision


def downsampling_factor(config: dict[str, Any]) -> int:
    """Return the image pixels per latent pixel along a side; every level but the last halves the image."""
    return 2 ** (len(config["block_out_channels"]) - 1)


def check_resolution(resolution: int, config: dict[str, Any]) -> None:
    """Raise a UserError unless `resolution` is a positive multiple of the down-sampling factor."""
    factor = downsampling_factor(config)
    if resolution < factor or resolution % factor:
        nearest = max(factor, round(resolution / factor) * factor)
        raise UserError(
            f"{resolution} is not a multiple of {factor}, by which this VAE divides the sides of an image; try {nearest}",
            parameter="resolution",
        )


class Moments(NamedTuple):
    """Mean and variance of the posterior N(mean, variance), each `[N,C,h,w]` float32, raw (unscaled)."""

    mean: Tensor
    variance: Tensor

    def latent(self, noise: Tensor | None) -> Tensor:
        """Return the mean, or the sample that `noise` `[N,C,h,w]` selects."""
        return self.mean if noise is None else self.mean + self.variance.sqrt() * noise


class LatentEncoder(nn.Module):
    """The trainable encoder E_theta: `encoder` and `quant_conv` of a VAE, sharing its parameters.

    `forward` maps images `[N,3,H,W]` in [-1,1] to raw moments `[N,2C,h,w]`, in `full_precision`.
    DistributedDataParallel wraps this module, since calling `vae.encode` past the wrapper would not synchronise the
    gradients of the processes.

    Args:
        vae: the VAE.
        autocast_dtype: the dtype in which the network runs; None runs it in its own.
    """

    def __init__(self, vae: AutoencoderKL, *, autocast_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.encoder = vae.encoder
        self.quant_conv = vae.quant_conv
        self.autocast_dtype = autocast_dtype

    def forward(self, images: Tensor) -> Tensor:
        with autocast(images, self.autocast_dtype):
            moments = self.encoder(images)
            if self.quant_conv is not None:
                moments = self.quant_conv(moments)
        return full_precision(moments)


class LatentDecoder(nn.Module):
    """The frozen decoder D_phi: `post_quant_conv` and `decoder` of a VAE. Gradients pass through to the latents.

    `forward` maps raw latents `[N,C,h,w]` to images `[N,3,H,W]`, in `full_precision`, about in [-1,1].
    """

    def __init__(self, vae: AutoencoderKL, *, autocast_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.post_quant_conv = vae.post_quant_conv
        self.decoder = vae.decoder
        self.autocast_dtype = autocast_dtype
        self.requires_grad_(False)

    def forward(self, latents: Tensor) -> Tensor:
        with autocast(latents, self.autocast_dtype):
            if self.post_quant_conv is not None:
                latents = self.post_quant_conv(latents)
            images = self.decoder(latents)
        return full_precision(images)


def split_moments(moments: Tensor) -> Moments:
    """Return raw moments `[N,2C,h,w]` as mean and variance; the log-variance is clipped as in diffusers."""
    posterior = DiagonalGaussianDistribution(moments)
    return Moments(posterior.mean, posterior.var)


NETWORK = TypeVar("NETWORK", LatentEncoder, LatentDecoder)


def frozen_copy(network: NETWORK, rebuild: Callable[[NETWORK], NETWORK] = lambda network: network) -> NETWORK:
    """Return a frozen copy of a network, such as E_theta0.

    Weights of convolutions and linear layers, which autocast would cast at every call, are held in its dtype.

    Args:
        network: the network; it stays as it is.
        rebuild: changes the copy before its weights are cast.
    """
    twin = rebuild(copy.deepcopy(network).requires_grad_(False).eval())
    if twin.autocast_dtype is not None:
        for layer in twin.modules():
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                layer.to(twin.autocast_dtype)
    return twin


class EncoderMirror:
    """A frozen twin of the encoder in training, for attacks on it.

    With frozen weights, neither autograd nor compiled code computes weight gradients, and each weight is cast at most
    once a step. Weights of equal precision share memory; `refresh` updates the others.
    """

    def __init__(self, original: LatentEncoder) -> None:
        self.encoder = frozen_copy(original)
        self._copied: list[tuple[nn.Parameter, nn.Parameter]] = []
        for own, trained in zip(self.encoder.parameters(), original.parameters(), strict=True):
            if own.dtype == trained.dtype:
                own.data = trained.data
            else:
                self._copied.append((own, trained))

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the original's weights, after an optimizer step or after loading a checkpoint."""
        for own, trained in self._copied:
            own.copy_(trained)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Switch off the gradients of a module's parameters within the context.

    An attack needs the image's gradient alone. Autograd would skip those of the parameters by itself, but keep the
    activations for them, and a compiled backward pass would compute them.
    """
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def latent_shape(config: dict[str, Any], resolution: int) -> tuple[int, int, int]:
    """Return the shape (C, h, w) of the latent of a square image of `resolution` pixels."""
    side = resolution // downsampling_factor(config)
    return (config["latent_channels"], side, side)


def autocast(tensor: Tensor, dtype: torch.dtype | None) -> AbstractContextManager:
    """Return autocast to `dtype` on the tensor's device; None means no autocast."""
    return nullcontext() if dtype is None else torch.autocast(tensor.device.type, dtype)
