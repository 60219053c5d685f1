"""What the method needs to know of each class of autoencoder in diffusers: one row of `FAMILIES` per class.

A further class needs a row here and a small random instance in `tests/helpers/autoencoders.py`; the tests run on every row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import diffusers
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanImage,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTXVideo,
    AutoencoderKLMagvit,
    AutoencoderKLMochi,
    AutoencoderKLQwenImage,
    AutoencoderKLTemporalDecoder,
    AutoencoderKLWan,
    AutoencoderTiny,
    ModelMixin,
    VQModel,
)
from torch import Tensor

from srl_utils.errors import UserError

Config = Mapping[str, Any]

AutoencoderKLLTX2Video: Any = getattr(diffusers, "AutoencoderKLLTX2Video", None)
"""None before diffusers 0.37, which has no such class."""


def halvings(entry: str) -> Callable[[Config], int]:
    """Return the down-sampling of an encoder whose levels, all but the last, halve the image; `entry` lists the levels."""
    return lambda config: 2 ** (len(config[entry]) - 1)


def product(entry: str) -> Callable[[Config], int]:
    """Return the product of the numbers that the configuration lists under `entry`, one for each level."""
    return lambda config: prod(config[entry])


def stated(entry: str) -> Callable[[Config], int]:
    """Return the number that the configuration names `entry`."""
    return lambda config: config[entry]


BLOCKS = halvings("block_out_channels")


def ltx_down_sampling(config: Config) -> int:
    """Return the down-sampling of LTX, which later configurations name themselves."""
    named = config.get("spatial_compression_ratio")
    return named or config["patch_size"] * 2 ** sum(config["spatio_temporal_scaling"])


def ltx_decoding(config: Config, latents: Tensor) -> Mapping[str, Any]:
    """Return the time 0 for decoders that also denoise, as the pipelines of LTX do by default."""
    return {"temb": latents.new_zeros(len(latents))} if config.get("timestep_conditioning") else {}


def svd_decoding(config: Config, latents: Tensor) -> Mapping[str, Any]:
    """Return the number of frames, which are images of one batch."""
    return {"num_frames": 1 if latents.ndim == 4 else latents.shape[2]}


def four_at_a_time(config: Config) -> int:
    """Return 4: so many frames after the first are encoded together, and what is left is dropped or fails."""
    return 4


def cogvideox_frames(config: Config) -> int:
    """Return twice the frames of a latent: the decoder makes more frames than there were of an even number of latents."""
    return 2 * int(config["temporal_compression_ratio"])


def ltx_frames(config: Config) -> int:
    """Return the frames per latent of LTX, which later configurations name themselves."""
    named = config.get("temporal_compression_ratio")
    return named or config["patch_size_t"] * 2 ** sum(config["spatio_temporal_scaling"])


@dataclass(frozen=True, kw_only=True)
class Family:
    """How the autoencoders of a class are trained, called and read.

    Attributes:
        kind: the class.
        down_sampling: image pixels per latent pixel along a side, by configuration.
        trained: its submodules on the encoder's side; those that are None are left out. All others are frozen.
        checkpointing: whether diffusers can leave out its activations and compute the same. It has a mode for
            `AutoencoderTiny` too, in which the encoder does not bring images to [0,1], and for `AutoencoderKLMagvit`, in
            which frames of the last batch precede those of the next.
        frames: of which a multiple must follow the first frame of a clip, by configuration. None for VAEs of images, which
            encode clips frame by frame. VAEs of clips take `[N,3,T,H,W]`, and an image is a clip of one frame.
        batches: whether it takes several images or clips at a time. The mask in the attention of
            `AutoencoderKLHunyuanVideo15` fits one alone.
        tiling: whether large images may be processed in diffusers' tiles, if it has them. Those of `AutoencoderTiny` take
            latents of four channels alone, and it needs little memory without them. Those of `AutoencoderKLMagvit` are put
            together without regard to their overlap, and those of `AutoencoderKLHunyuanImage` expect clips.
        posterior: whether the encoder gives a posterior, and not a point.
        quantizer: its submodule with the codebook, of diffusers' `VectorQuantizer`; None for continuous latents.
        channels: entries of the configuration that tell the channels of an image; each class has some of them.
        patch: entry of the configuration with the side of the pixel patches that its channels hold, if any.
        decoding: further arguments of `decode`, by configuration and latents.
    """

    kind: type[ModelMixin]
    down_sampling: Callable[[Config], int] = BLOCKS
    trained: Sequence[str] = ("encoder", "quant_conv")
    checkpointing: bool = True
    frames: Callable[[Config], int] | None = None
    batches: bool = True
    tiling: bool = True
    posterior: bool = True
    quantizer: str | None = None
    channels: Sequence[str] = ("in_channels", "input_channels", "out_channels")
    patch: str | None = None
    decoding: Callable[[Config, Tensor], Mapping[str, Any]] = lambda config, latents: {}

    @property
    def video(self) -> bool:
        """Return whether it takes clips."""
        return self.frames is not None

    def image_channels(self, config: Config) -> set[int]:
        """Return the channels of the images that it takes and makes."""
        area = ((config[self.patch] if self.patch else None) or 1) ** 2
        return {config[entry] // area for entry in self.channels if entry in config}


FAMILIES = {
    family.kind.__name__: family
    for family in (
        Family(kind=AutoencoderKL),
        Family(
            kind=AsymmetricAutoencoderKL, down_sampling=halvings("down_block_out_channels"), checkpointing=False
        ),
        Family(kind=AutoencoderKLFlux2),
        Family(kind=AutoencoderKLTemporalDecoder, decoding=svd_decoding),
        Family(
            kind=AutoencoderDC, down_sampling=halvings("encoder_block_out_channels"), trained=("encoder",),
            checkpointing=False, posterior=False,
        ),
        Family(
            kind=AutoencoderTiny, down_sampling=halvings("encoder_block_out_channels"), trained=("encoder",),
            checkpointing=False, tiling=False, posterior=False,
        ),
        Family(kind=VQModel, checkpointing=False, posterior=False, quantizer="quantize"),
        Family(
            kind=AutoencoderKLHunyuanImage, down_sampling=stated("spatial_compression_ratio"), trained=("encoder",),
            checkpointing=False, tiling=False,
        ),
        Family(
            kind=AutoencoderKLWan, down_sampling=stated("scale_factor_spatial"), checkpointing=False,
            frames=four_at_a_time, patch="patch_size",
        ),
        Family(
            kind=AutoencoderKLQwenImage, down_sampling=halvings("dim_mult"), checkpointing=False,
            frames=four_at_a_time,
        ),
        Family(
            kind=AutoencoderKLHunyuanVideo, down_sampling=stated("spatial_compression_ratio"),
            frames=stated("temporal_compression_ratio"),
        ),
        Family(
            kind=AutoencoderKLHunyuanVideo15, down_sampling=stated("spatial_compression_ratio"), trained=("encoder",),
            frames=stated("temporal_compression_ratio"), batches=False,
        ),
        Family(kind=AutoencoderKLCogVideoX, frames=cogvideox_frames),
        Family(
            kind=AutoencoderKLLTXVideo, trained=("encoder",), frames=ltx_frames,
            down_sampling=ltx_down_sampling, decoding=ltx_decoding,
        ),
        Family(
            kind=AutoencoderKLLTX2Video, trained=("encoder",), frames=ltx_frames,
            down_sampling=ltx_down_sampling, decoding=ltx_decoding,
        ),
        Family(kind=AutoencoderKLMagvit, checkpointing=False, frames=four_at_a_time, tiling=False),
        Family(  # the encoder takes waves of the pixels beside them, which count as channels
            kind=AutoencoderKLMochi, down_sampling=product("spatial_expansions"), trained=("encoder",),
            frames=product("temporal_expansions"), channels=("out_channels",),
        ),
    )
    if family.kind is not None
}  # fmt: skip
"""The supported classes by name."""


def find_family(vae: object) -> Family | None:
    """Return the description of a VAE's class or of one that it is derived from; None for all else."""
    kinds = (kind.__name__ for kind in type(vae).__mro__)
    return next((FAMILIES[kind] for kind in kinds if kind in FAMILIES), None)


def family_of(vae: ModelMixin) -> Family:
    """Return the description of a VAE's class or of one that it is derived from.

    Raises:
        UserError: if none is supported.
    """
    return find_family(vae) or named_family(type(vae).__name__, "this VAE")


def named_family(name: str, owner: str) -> Family:
    """Return the description of the class `name`; errors call the VAE `owner`.

    Raises:
        UserError: if the class is not supported.
    """
    if name not in FAMILIES:
        raise UserError(f"{owner} is of the class {name}; the supported VAEs are {', '.join(FAMILIES)}")
    return FAMILIES[name]
