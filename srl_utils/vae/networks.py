"""Split an autoencoder into what the method needs: a trainable encoder, a frozen decoder, a frozen reference."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from diffusers import ModelMixin
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from srl_utils.errors import UserError
from srl_utils.images.pixels import clips_of, frames_of
from srl_utils.vae.families import Family, family_of, named_family
from srl_utils.vae.low_rank import with_merged_updates
from srl_utils.vae.precision import full_precision

NO_VARIANCE = -30.0
"""The log-variance of an encoder without a posterior: the lowest that diffusers allows."""


def downsampling_factor(vae: ModelMixin) -> int:
    """Return the image pixels per latent pixel along a side."""
    return family_of(vae).down_sampling(vae.config)


def check_resolution(resolution: int, config: dict[str, Any]) -> None:
    """Raise a UserError unless `resolution` is a positive multiple of the down-sampling factor.

    Args:
        resolution: side of the images in pixels.
        config: of the VAE, with its class's name.
    """
    factor = named_family(config["_class_name"], "the VAE").down_sampling(config)
    if resolution < factor or resolution % factor:
        nearest = max(factor, round(resolution / factor) * factor)
        raise UserError(
            f"{resolution} is not a multiple of {factor}, by which this VAE divides the sides of an image; try {nearest}",
            parameter="resolution",
        )


def check_frames(num_frames: int, config: dict[str, Any]) -> None:
    """Raise a UserError unless a VAE gives back clips of `num_frames` frames whole.

    Args:
        num_frames: frames of a clip; 1 stands for images, which every VAE takes.
        config: of the VAE, with its class's name.
    """
    frames = named_family(config["_class_name"], "the VAE").frames
    factor = 1 if frames is None else frames(config)
    if (num_frames - 1) % factor:
        nearest = 1 + max(1, round((num_frames - 1) / factor)) * factor
        raise UserError(
            f"{num_frames} frames do not suit this VAE, which takes 1 plus a multiple of {factor}; try {nearest}",
            parameter="num_frames",
        )


class Moments(NamedTuple):
    """Mean and variance of the posterior N(mean, variance), each `[N,C,h,w]` float32, raw (unscaled)."""

    mean: Tensor
    variance: Tensor

    def latent(self, noise: Tensor | None) -> Tensor:
        """Return the mean, or the sample that `noise` `[N,C,h,w]` selects."""
        return self.mean if noise is None else self.mean + self.variance.sqrt() * noise


class Layout(NamedTuple):
    """How a VAE takes a batch: an image as a clip of one frame, or a clip as images."""

    still: bool
    """Whether a VAE of clips gets images."""
    clips: int
    """The number of clips that a VAE of images gets; 0 for all other batches."""

    @classmethod
    def of(cls, family: Family, batch: Tensor) -> Layout:
        """Return the layout of a batch of images or latents, `[N,C,h,w]` or `[N,C,t,h,w]`."""
        return cls(family.video and batch.ndim == 4, 0 if family.video or batch.ndim == 4 else len(batch))

    def given(self, batch: Tensor) -> Tensor:
        """Return the batch as the VAE takes it."""
        return batch.unsqueeze(2) if self.still else frames_of(batch) if self.clips else batch

    def returned(self, batch: Tensor) -> Tensor:
        """Return what the VAE made of it in the layout of the batch."""
        return batch.squeeze(2) if self.still else clips_of(batch, self.clips) if self.clips else batch


class LatentEncoder(nn.Module):
    """The trainable encoder E_theta: the encoder's side of a VAE, sharing its parameters.

    `forward` maps images `[N,3,H,W]` in [-1,1] to raw moments `[N,2C,h,w]`, or clips `[N,3,T,H,W]` to `[N,2C,t,h,w]`, in
    `full_precision`. Without a posterior the variance is nearly 0. A VAE of images encodes a clip frame by frame.

    DistributedDataParallel wraps this module, since calling `vae.encode` past the wrapper would not synchronise the
    gradients of the processes.

    Args:
        vae: the VAE; see `FAMILIES`.
        autocast_dtype: the dtype in which the network runs; None runs it in its own.
    """

    def __init__(self, vae: ModelMixin, *, autocast_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.family = family_of(vae)
        for name in self.family.trained:
            self.add_module(name, getattr(vae, name, None))
        self.whole = (vae,)  # in a tuple, so that its other parts are no parts of this module
        self.autocast_dtype = autocast_dtype

    def forward(self, images: Tensor) -> Tensor:
        layout = Layout.of(self.family, images)
        with autocast(images, self.autocast_dtype):
            moments = in_batches(self.family, self._moments, layout.given(images))
        return full_precision(layout.returned(moments))

    def _moments(self, given: Tensor) -> Tensor:
        (output,) = self.whole[0].encode(given, return_dict=False)
        if isinstance(output, Tensor):
            return torch.cat([output, torch.full_like(output, NO_VARIANCE)], dim=1)
        return output.parameters


class LatentDecoder(nn.Module):
    """The frozen decoder D_phi: all of a VAE but the encoder's side. Gradients pass through to the latents.

    `forward` maps raw latents `[N,C,h,w]` to images `[N,3,H,W]`, or `[N,C,t,h,w]` to clips, in `full_precision`, about in
    [-1,1]. Discrete latents are quantised with a straight-through gradient.
    """

    def __init__(self, vae: ModelMixin, *, autocast_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.family = family_of(vae)
        for name, part in vae.named_children():
            if name not in self.family.trained:
                self.add_module(name, part)
        self.whole = (vae,)
        self.autocast_dtype = autocast_dtype

    def forward(self, latents: Tensor) -> Tensor:
        layout = Layout.of(self.family, latents)
        arguments = self.family.decoding(self.whole[0].config, latents)
        with autocast(latents, self.autocast_dtype):
            images = in_batches(
                self.family,
                lambda given: self.whole[0].decode(given, return_dict=False, **arguments)[0],
                layout.given(latents),
            )
        return full_precision(layout.returned(images))


def in_batches(family: Family, network: Callable[[Tensor], Tensor], given: Tensor) -> Tensor:
    """Return what a network makes of a batch, one by one where the VAE takes no batches."""
    return network(given) if family.batches else torch.cat([network(part) for part in given.split(1)])


def split_moments(moments: Tensor) -> Moments:
    """Return raw moments `[N,2C,h,w]` as mean and variance; the log-variance is clipped as in diffusers."""
    posterior = DiagonalGaussianDistribution(moments)
    return Moments(posterior.mean, posterior.var)


NETWORK = TypeVar("NETWORK", LatentEncoder, LatentDecoder)
VAE = TypeVar("VAE", bound=ModelMixin)


def frozen_copy(network: NETWORK, rebuild: Callable[[NETWORK], NETWORK] = lambda network: network) -> NETWORK:
    """Return a frozen copy of a network, such as E_theta0, with plain weights.

    Weights of convolutions and linear layers, which autocast would cast at every call, are held in its dtype.

    Args:
        network: the network; it stays as it is.
        rebuild: changes the copy before its weights are cast.
    """
    own = {id(part) for part in network.children()}
    others = [part for part in network.whole[0].children() if id(part) not in own]
    twin = with_merged_updates(copy.deepcopy(network, {id(part): part for part in others}))
    twin = rebuild(twin.requires_grad_(False).eval())
    if twin.autocast_dtype is not None:
        for layer in twin.modules():
            if isinstance(layer, (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)):
                layer.to(twin.autocast_dtype)
    return twin


class EncoderMirror:
    """A frozen twin of the encoder in training, for attacks on it.

    With frozen weights, neither autograd nor compiled code computes weight gradients, and each weight is cast at most
    once a step. Weights of equal precision share memory; `refresh` updates the others, and those with low-rank updates.
    """

    def __init__(self, original: LatentEncoder) -> None:
        self.encoder = frozen_copy(original)
        self._copied: list[tuple[nn.Parameter, nn.Module, str]] = []
        for name, own in self.encoder.named_parameters():
            place, _, kind = name.rpartition(".")
            layer = original.get_submodule(place)
            trained = getattr(layer, kind)
            if isinstance(trained, nn.Parameter) and own.dtype == trained.dtype:
                own.data = trained.data
            else:
                self._copied.append((own, layer, kind))

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the original's weights, after an optimizer step or after loading a checkpoint."""
        for own, layer, kind in self._copied:
            own.copy_(getattr(layer, kind))


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


def to_channels_last(vae: VAE) -> VAE:
    """Move a VAE's weights to channels-last memory, in place, those of convolutions over time too.

    `Module.to` refuses networks that have weights of both ranks.
    """
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in vae.parameters():
        if parameter.ndim in layouts:
            parameter.data = parameter.data.to(memory_format=layouts[parameter.ndim])
    return vae


@torch.no_grad()
def latent_shape(encoder: LatentEncoder, images: Tensor) -> torch.Size:
    """Return the shape `[C,h,w]` of the latents of images `[N,3,H,W]`, or `[C,t,h,w]` of those of clips."""
    return split_moments(encoder(images[:1])).mean.shape[1:]


def autocast(tensor: Tensor, dtype: torch.dtype | None) -> AbstractContextManager:
    """Return autocast to `dtype` on the tensor's device; None means no autocast."""
    return nullcontext() if dtype is None else torch.autocast(tensor.device.type, dtype)
