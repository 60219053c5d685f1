"""An `AutoencoderKL` as the method sees it: a trainable encoder, a frozen decoder, a frozen reference."""

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
    """Image pixels per latent pixel along a side: every level but the last halves the image."""
    return 2 ** (len(config["block_out_channels"]) - 1)


def check_resolution(resolution: int, config: dict[str, Any]) -> None:
    """Raises a UserError unless `resolution` is a positive multiple of the down-sampling factor."""
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
        """The mean, or the sample that `noise` `[N,C,h,w]` selects."""
        return self.mean if noise is None else self.mean + self.variance.sqrt() * noise


class LatentEncoder(nn.Module):
    """E_theta: `encoder` and `quant_conv` of a VAE, sharing its parameters.

    `forward` maps images `[N,3,H,W]` in [-1,1] to the raw moments `[N,2C,h,w]`, in `full_precision`. It is the module
    that DistributedDataParallel wraps: calling `vae.encode` past the wrapper would leave the gradients of the
    processes apart. The network runs in `autocast_dtype` where one is given.
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
    """D_phi: `post_quant_conv` and `decoder` of a VAE, frozen. Gradients pass through to the latents.

    `forward` maps raw latents `[N,C,h,w]` to images `[N,3,H,W]`, in `full_precision`, about [-1,1].
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
    """Raw moments `[N,2C,h,w]` as mean and variance, the log-variance clipped as diffusers does."""
    posterior = DiagonalGaussianDistribution(moments)
    return Moments(posterior.mean, posterior.var)


NETWORK = TypeVar("NETWORK", LatentEncoder, LatentDecoder)


def frozen_copy(network: NETWORK, rebuild: Callable[[NETWORK], NETWORK] = lambda network: network) -> NETWORK:
    """The network as it is now, never to change, such as E_theta0.

    What autocast would cast at every call, the weights of convolutions and linear layers, is held in its precision;
    `rebuild` is given the copy before they are cast.
    """
    twin = rebuild(copy.deepcopy(network).requires_grad_(False).eval())
    if twin.autocast_dtype is not None:
        for layer in twin.modules():
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                layer.to(twin.autocast_dtype)
    return twin


class EncoderMirror:
    """A frozen twin of the encoder that is being trained, for attacks on it.

    Autograd and compiled backward passes then compute no weight gradients, and no weight is cast more than once a
    step. Weights held in the same precision share their memory; `refresh` brings the others up to date.
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
        """After the original's weights have changed, be it by a step of the optimizer or from a checkpoint."""
        for own, trained in self._copied:
            own.copy_(trained)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No parameter of `module` requires gradient within; what did before does again afterwards.

    During an attack only the image's gradient is wanted. Autograd would skip the parameters' by itself, but
    would keep the activations they need, and a compiled backward pass would compute them all the same.
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
    """Shape (C, h, w) of the latent of a square image."""
    side = resolution // downsampling_factor(config)
    return (config["latent_channels"], side, side)


def autocast(tensor: Tensor, dtype: torch.dtype | None) -> AbstractContextManager:
    return nullcontext() if dtype is None else torch.autocast(tensor.device.type, dtype)
