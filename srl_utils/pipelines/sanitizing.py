"""Clean images: pass them through a robust VAE or other purifiers, which weaken perturbations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, ModelMixin
from PIL import Image
from torch import Tensor

from srl_utils.attacks.draws import image_generators
from srl_utils.errors import WrongType, errors_about
from srl_utils.images.decoding import to_srgb
from srl_utils.images.pixels import check_images, from_pil, to_model_range, to_pil, to_unit_range
from srl_utils.metrics.losses import load_perceptual_distance
from srl_utils.pipelines.loading import purifying_pipeline
from srl_utils.pipelines.metadata import read_metadata, srgb_profile
from srl_utils.pipelines.precision import execution_device, frozen_in_float32, reconstruct
from srl_utils.pipelines.swapping import resolve_vae
from srl_utils.purifiers import LOOP, Purifier, PurifierResources, purifier_of, uses_perceptual
from srl_utils.vae.codec import Codec
from srl_utils.vae.networks import downsampling_factor

TILE_ABOVE = 1024

Images = TypeVar("Images", Image.Image, np.ndarray, Tensor, list)


def sanitize(
    images: Images,
    vae: ModelMixin | str | PathLike[str] | None = None,
    *,
    purifier: str = LOOP,
    purifier_pipelines: Sequence[DiffusionPipeline] = (),
    seed: int = 0,
    tile_above: int = TILE_ABOVE,
    **loading: Any,
) -> Images:
    """Clean protected or attacked images: by default, encode and decode them with `vae`.

    The posterior's mean is decoded, so that pass is deterministic. Sides are padded to a multiple of the VAE's
    down-sampling factor by repeating the border, and cropped afterwards.

    Args:
        images: a PIL image of any mode (of an animation the current frame), an array `[H,W,3]` or `[N,H,W,3]`, a tensor
            `[3,H,W]` or `[N,3,H,W]` (floats in [0,1], as pipelines return them, or uint8 in [0,255]), or a list of
            these, of any sizes.
        vae: a VAE of a class in `FAMILIES`, a folder, or a Hub id. A folder or Hub id is loaded in each call. None for a
            purifier that needs no VAE.
        purifier: what is done, as `srl_utils.purifiers.purifier_of` reads it: `vae-loop` is the pass through the VAE, and
            `jpeg-75+vae-loop` writes a JPEG file before it.
        purifier_pipelines: pipelines of diffusers for purifiers such as `img2img-0.1`; each takes the first that fits it.
        seed: of what purifiers draw. Every image draws the same numbers, so its result does not depend on other images.
        tile_above: images with a longer side, in pixels, are processed in the VAE's overlapping tiles.
        loading: `subfolder`, `revision`, `variant` of a folder or Hub id.

    Returns:
        The same kind, size and dtype. PIL images are upright and sRGB: RGBA with the same alpha if the image is
        transparent, else RGB. Their `info` keeps `dpi`, `exif`, `xmp` and `comment`. A half-precision VAE that
        overflows computes in float32.

    Raises:
        UserError: if `vae` cannot be loaded, or returns values that are not finite; if there is no such purifier, or if
            it lacks a VAE, LPIPS or a pipeline.
        WrongType: a TypeError and a ValueError, if `images` or `purifier_pipelines` are of another kind.
        ValueError: if an array or a tensor has another shape, dtype or range; UnreadableImage, if a PIL image is
            broken.
    """
    model = None if vae is None else resolve_vae(vae, **loading)
    pipelines = list(map(purifying_pipeline, purifier_pipelines))
    return _sanitize(images, build_purifier(purifier, model, pipelines, seed=seed, tile_above=tile_above))


def build_purifier(
    name: str,
    vae: ModelMixin | None,
    pipelines: Sequence[DiffusionPipeline] = (),
    *,
    seed: int = 0,
    tile_above: int = TILE_ABOVE,
) -> Purifier:
    """Return the purifier of this name for images of any size; every image draws the same numbers.

    Args:
        name: of a purifier or a chain.
        vae: what `vae-loop` and IMPRESS use.
        pipelines: what purifiers by diffusion use; see `purifying_pipeline`.
        seed: of what purifiers draw.
        tile_above: images with a longer side, in pixels, are processed in the VAE's tiles.

    Raises:
        UserError: see `sanitize`.
    """
    vaes = {} if vae is None else {"vae": AnySize(vae, tile_above)}
    perceptual = None
    if vae is not None and uses_perceptual(name):
        perceptual = load_perceptual_distance("vgg").to(execution_device(vae))
    with errors_about("purifier"):
        purifier = purifier_of(name, PurifierResources(vaes=vaes, pipelines=pipelines, perceptual=perceptual))
    return replace(purifier, apply=lambda images, _: purifier(images, image_generators(seed, [0] * len(images))))


@dataclass(frozen=True)
class AnySize:
    """A VAE that takes images of any size.

    Attributes:
        vae: of a class in `FAMILIES`.
        tile_above: images with a longer side, in pixels, are processed in its tiles.
    """

    vae: ModelMixin
    tile_above: int

    @property
    def device(self) -> torch.device:
        return execution_device(self.vae)

    @cached_property
    def differentiable(self) -> Codec:
        """Return the VAE with frozen weights in float32, whose gradients are accurate and reach the images alone."""
        return Codec.of(frozen_in_float32(self.vae), "")

    def reconstruct(self, images: Tensor) -> Tensor:
        """Return reconstructions of images, both `[N,3,H,W]` in [-1,1]; with gradients in float32, and never in tiles."""
        height, width = images.shape[-2:]
        factor = downsampling_factor(self.vae)
        padded = F.pad(images.float(), (0, -width % factor, 0, -height % factor), mode="replicate")
        if torch.is_grad_enabled() and images.requires_grad:
            with torch.autocast(self.device.type, enabled=False):
                made = self.differentiable.reconstruct(padded)
        else:
            made = reconstruct(padded, self.vae, tiled=max(height, width) > self.tile_above)
        return made[..., :height, :width]


def _sanitize(images: Images, purifier: Purifier) -> Images:
    if isinstance(images, (list, tuple)):
        each: Any = [_sanitize(image, purifier) for image in images]
        return each
    if isinstance(images, Image.Image):
        return _sanitize_image(images, purifier)
    if isinstance(images, np.ndarray):
        channels_first = np.moveaxis(images, -1, -3) if images.ndim in (3, 4) else images
        cleaned = _sanitize_tensor(torch.from_numpy(np.ascontiguousarray(channels_first)), purifier)
        return np.ascontiguousarray(np.moveaxis(cleaned.numpy(), -3, -1))
    if isinstance(images, Tensor):
        return _sanitize_tensor(images, purifier)
    raise WrongType(f"expected PIL images, arrays or tensors, got {type(images).__name__}")


def purify_frame(
    image: Image.Image, purifier: Purifier, *, flat: bool = False
) -> tuple[Image.Image, Image.Image | None]:
    """Purify the current frame of an opened image.

    The alpha stays the same. Fully transparent parts first get the colours around them, so that hidden colours do not
    show at the edges.

    Args:
        image: the opened image.
        purifier: changes its colours.
        flat: put transparent parts over white instead.

    Returns:
        The frame, upright, RGB or RGBA, and its alpha, if any.
    """
    colour, alpha = to_srgb(image)
    if alpha is not None and flat:
        colour = Image.composite(colour, Image.new("RGB", colour.size, "white"), alpha)
    elif alpha is not None:
        colour = spread_colours(colour, alpha)
    cleaned = to_pil(_purify(from_pil(colour)[None], purifier)[0])
    if alpha is not None and not flat:
        cleaned.putalpha(alpha)
    return cleaned, alpha


def spread_colours(colour: Image.Image, alpha: Image.Image) -> Image.Image:
    """Return an RGB image whose fully transparent parts have the visible colours around them.

    Args:
        colour: RGB.
        alpha: mode L, of the same size.
    """
    if alpha.histogram()[0] == 0 or max(colour.size) == 1:
        return colour
    coarse = colour.copy()
    coarse.putalpha(alpha)
    coarse = coarse.reduce(2)  # Pillow weights the colours by alpha
    coarse_alpha = coarse.getchannel("A").point([0] + [255] * 255)
    around = spread_colours(coarse.convert("RGB"), coarse_alpha).resize(colour.size, Image.Resampling.BILINEAR)
    return Image.composite(colour, around, alpha.point([0] + [255] * 255))


def _sanitize_image(image: Image.Image, purifier: Purifier) -> Image.Image:
    cleaned, _ = purify_frame(image, purifier)
    metadata = read_metadata(image)
    kept = {"dpi": metadata.dpi, "xmp": metadata.xmp, "comment": metadata.comment, "icc_profile": srgb_profile()}
    if len(metadata.exif):
        kept["exif"] = metadata.exif.tobytes()
    cleaned.info = {name: value for name, value in kept.items() if value}
    return cleaned


def _sanitize_tensor(images: Tensor, purifier: Purifier) -> Tensor:
    """Return sanitized images `[...,3,H,W]` in the range and dtype of the input: floats in [0,1] or uint8."""
    if images.ndim == 3:
        return _sanitize_tensor(images[None], purifier)[0]
    whole_numbers = images.dtype == torch.uint8
    unit_range = images.float() / 255 if whole_numbers else _checked(images).float()
    cleaned = to_unit_range(_purify(to_model_range(unit_range), purifier))
    if whole_numbers:
        cleaned = cleaned.mul(255).round()
    return cleaned.to(device=images.device, dtype=images.dtype)


def _checked(images: Tensor) -> Tensor:
    """Return `images` if they are floats in [0,1]; the message of `check_images` would name [-1,1]."""
    if not images.is_floating_point():
        raise ValueError(f"expected floats in [0,1] or uint8, got {images.dtype}")
    low, high = images.aminmax() if images.numel() else (0, 0)
    if not (low >= -2e-3 and high <= 1 + 2e-3):  # the tolerance of `check_images`; NaN fails both comparisons
        raise ValueError(f"expected floats in [0,1] or uint8, got values from {low:.3f} to {high:.3f}")
    return images


@torch.no_grad()
def _purify(images: Tensor, purifier: Purifier) -> Tensor:
    """Return purified images, float32 in [-1,1], of images `[N,3,H,W]` in [-1,1] of any size."""
    check_images(images)
    return purifier(images.float())
