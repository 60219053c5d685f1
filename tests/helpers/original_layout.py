"""The names and shapes of an autoencoder in the original latent-diffusion code, written from its modules."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import sha256

import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
SD_CHANNELS = (128, 256, 512, 512)
PUBLISHED_NAMES = {
    "sd": "007cb2ad4dcb0a88321a7718b7512aa86b46ae5f01aa220043fc68e852ff0bf9",
    "sdxl": "007cb2ad4dcb0a88321a7718b7512aa86b46ae5f01aa220043fc68e852ff0bf9",
    "sd3": "65d188cec537ea1986c5adec40096de462ce84413916fcec43589e87c7376f57",
    "flux": "65d188cec537ea1986c5adec40096de462ce84413916fcec43589e87c7376f57",
}
"""`digest_of_names` of the public VAEs, made from lists that others published, and not with any code of this repository.

- sd: the 248 names with `first_stage_model.` in modelscope/DiffSynth-Studio, commit afd101f3452c,
  diffsynth/models/sd_vae_encoder.py and sd_vae_decoder.py, without this beginning.
- sdxl: likewise, commit fed7b18fac2e, diffsynth/utils/state_dict_converters/sdxl_vae.py.
- flux: the 244 keys that `FluxVAEEncoderStateDictConverter` and `FluxVAEDecoderStateDictConverter` take, in flux_vae.py
  beside it.
- sd3: the 244 names in the state of `SDVAE` in Stability-AI/sd3-ref, commit 883b83684167, sd3_impls.py.
"""


def original_shapes(
    *, latent_channels: int, quant_conv: bool, channels: Sequence[int] = SD_CHANNELS, blocks: int = 2
) -> Shapes:
    """Return what `Encoder`, `Decoder` and `AutoencoderKL` of CompVis/latent-diffusion hold, `blocks` a level.

    For `SD_CHANNELS`, `PUBLISHED_NAMES` checks the names.
    """
    shapes = _conv("encoder.conv_in", 3, channels[0], 3)
    width = channels[0]
    for level, wider in enumerate(channels):
        for block in range(blocks):
            shapes |= _residual(f"encoder.down.{level}.block.{block}", width, width := wider)
        if level < len(channels) - 1:
            shapes |= _conv(f"encoder.down.{level}.downsample.conv", width, width, 3)
    shapes |= _middle("encoder", width) | _norm("encoder.norm_out", width)
    shapes |= _conv("encoder.conv_out", width, 2 * latent_channels, 3)
    shapes |= _conv("decoder.conv_in", latent_channels, width, 3) | _middle("decoder", width)
    for level in reversed(range(len(channels))):
        for block in range(blocks + 1):
            shapes |= _residual(f"decoder.up.{level}.block.{block}", width, width := channels[level])
        if level > 0:
            shapes |= _conv(f"decoder.up.{level}.upsample.conv", width, width, 3)
    shapes |= _norm("decoder.norm_out", width) | _conv("decoder.conv_out", width, 3, 3)
    if quant_conv:
        shapes |= _conv("quant_conv", 2 * latent_channels, 2 * latent_channels, 1)
        shapes |= _conv("post_quant_conv", latent_channels, latent_channels, 1)
    return shapes


def digest_of_names(names: Iterable[str]) -> str:
    """Return the SHA-256 of the sorted names, joined by newlines."""
    return sha256("\n".join(sorted(names)).encode()).hexdigest()


def random_tensors(shapes: Shapes) -> dict[str, Tensor]:
    """Return seeded random tensors of these shapes."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _conv(name: str, inner: int, outer: int, side: int) -> Shapes:
    return {f"{name}.weight": (outer, inner, side, side), f"{name}.bias": (outer,)}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _residual(name: str, inner: int, outer: int) -> Shapes:
    shapes = _norm(f"{name}.norm1", inner) | _conv(f"{name}.conv1", inner, outer, 3)
    shapes |= _norm(f"{name}.norm2", outer) | _conv(f"{name}.conv2", outer, outer, 3)
    return shapes if inner == outer else shapes | _conv(f"{name}.nin_shortcut", inner, outer, 1)


def _middle(part: str, width: int) -> Shapes:
    shapes = _residual(f"{part}.mid.block_1", width, width) | _residual(f"{part}.mid.block_2", width, width)
    shapes |= _norm(f"{part}.mid.attn_1.norm", width)
    for layer in ("q", "k", "v", "proj_out"):
        shapes |= _conv(f"{part}.mid.attn_1.{layer}", width, width, 1)
    return shapes
