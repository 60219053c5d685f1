"""Cleaning images: encoded and decoded by a robust VAE, a perturbation does not get through as it came."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from srl_utils.autoencoders import downsampling_factor
from srl_utils.decoding import decode_rgb
from srl_utils.images import check_images, from_pil, to_model_range, to_pil, to_unit_range
from srl_utils.pipelines.swapping import resolve_vae

TILE_ABOVE = 1024

Images = TypeVar("Images", Image.Image, np.ndarray, Tensor, list)


def sanitize(
    images: Images, vae: AutoencoderKL | str | PathLike[str], *, tile_above: int = TILE_ABOVE, **loading: Any
) -> Images:
    """Encodes and decodes images through `vae`: a purifier of protected or attacked images.

    The posterior's mean is decoded, so the result is deterministic. Sides are padded to the VAE's down-sampling factor
    by repeating the border, and cropped back.

    Args:
        images: a PIL image of any mode (transparent parts over white), an array `[H,W,3]` or `[N,H,W,3]`, a tensor
            `[3,H,W]` or `[N,3,H,W]` (floats in [0,1], as pipelines return them, or uint8 in [0,255]), or a list of
            any of these, of any sizes.
        vae: an `AutoencoderKL`, a folder, or a Hub id; given an object, it is not loaded for each call.
        tile_above: images with a longer side are processed in the VAE's overlapping tiles.
        loading: `subfolder`, `revision`, `variant` of a folder or Hub id.

    Returns:
        The same kind, size and dtype; PIL images are RGB.

    Raises:
        UserError: if `vae` cannot be loaded.
        ValueError: if `images` are none of the above; UnreadableImage, a ValueError, if a PIL image is broken.
    """
    model = resolve_vae(vae, **loading)
    if isinstance(images, (list, tuple)):
        return [sanitize(image, model, tile_above=tile_above) for image in images]
    if isinstance(images, Image.Image):
        return to_pil(_purify(from_pil(decode_rgb(images))[None], model, tile_above)[0])
    if isinstance(images, np.ndarray):
        channels_first = np.moveaxis(images, -1, -3) if images.ndim in (3, 4) else images
        cleaned = _sanitize_tensor(torch.from_numpy(np.ascontiguousarray(channels_first)), model, tile_above)
        return np.ascontiguousarray(np.moveaxis(cleaned.numpy(), -3, -1))
    if isinstance(images, Tensor):
        return _sanitize_tensor(images, model, tile_above)
    raise ValueError(f"expected PIL images, arrays or tensors, got {type(images).__name__}")


def _sanitize_tensor(images: Tensor, vae: AutoencoderKL, tile_above: int) -> Tensor:
    """Images `[...,3,H,W]`, floats in [0,1] or uint8, to the same."""
    if images.ndim == 3:
        return _sanitize_tensor(images[None], vae, tile_above)[0]
    whole_numbers = images.dtype == torch.uint8
    unit_range = images.float() / 255 if whole_numbers else _checked(images).float()
    cleaned = to_unit_range(_purify(to_model_range(unit_range), vae, tile_above))
    if whole_numbers:
        cleaned = cleaned.mul(255).round()
    return cleaned.to(device=images.device, dtype=images.dtype)


def _checked(images: Tensor) -> Tensor:
    """`images`, if they are floats in [0,1]; `check_images` would speak of [-1,1]."""
    if not images.is_floating_point():
        raise ValueError(f"expected floats in [0,1] or uint8, got {images.dtype}")
    low, high = images.aminmax() if images.numel() else (0, 0)
    if not (low >= -2e-3 and high <= 1 + 2e-3):  # the tolerance of `check_images`; NaN fails both comparisons
        raise ValueError(f"expected floats in [0,1] or uint8, got values from {low:.3f} to {high:.3f}")
    return images


def _purify(images: Tensor, vae: AutoencoderKL, tile_above: int) -> Tensor:
    """Images `[N,3,H,W]` in [-1,1], any size, to their reconstructions of the same size, float32 in [-1,1]."""
    check_images(images)
    height, width = images.shape[-2:]
    factor = downsampling_factor(vae.config)
    padded = F.pad(images.float(), (0, -width % factor, 0, -height % factor), mode="replicate")
    with torch.no_grad(), _set_up(vae, tiled=max(height, width) > tile_above):
        latents = vae.encode(padded.to(_execution_device(vae), vae.dtype)).latent_dist.mean
        reconstructions = vae.decode(latents).sample
    return reconstructions[..., :height, :width].float().clamp(-1, 1)


def _execution_device(vae: AutoencoderKL) -> torch.device:
    """Where `vae` computes; an offloading pipeline keeps its weights elsewhere in between."""
    hooks = (getattr(module, "_hf_hook", None) for module in vae.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return next((torch.device(device) for device in devices if device is not None), vae.device)


@contextmanager
def _set_up(vae: AutoencoderKL, *, tiled: bool) -> Iterator[None]:
    """Within, `vae` tiles if `tiled`, and computes in float32 if it cannot bear fp16; afterwards as before."""
    tiling, dtype = vae.use_tiling, vae.dtype
    upcast = dtype == torch.float16 and vae.config.force_upcast
    vae.use_tiling = tiling or tiled
    if upcast:
        vae.to(torch.float32)
    try:
        yield
    finally:
        vae.use_tiling = tiling
        if upcast:
            vae.to(dtype)
