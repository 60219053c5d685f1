"""Pixel ranges: the one place where a budget in units of a [0,1] image meets images in [-1,1].

Everywhere inside the code images are `[N,3,H,W]` float tensors in [-1,1], and clips of T frames `[N,3,T,H,W]`. On the
command line and in public functions an epsilon or a step size is in units of a [0,1] image, as the literature writes
it (8/255).
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import torch
from PIL import Image
from torch import Tensor

PIXEL_MIN, PIXEL_MAX = -1.0, 1.0
PIXEL_RANGE = PIXEL_MAX - PIXEL_MIN


def parse_pixel_distance(text: str) -> float:
    """Return the distance between [0,1] images that a text such as `8/255` or `0.0314` states.

    Raises:
        ValueError: if `text` is not a number or a fraction, or is outside [0,1].
    """
    try:
        value = float(Fraction(text.replace(" ", "")))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ValueError(f"'{text}' is not a number or a fraction such as 8/255") from None
    if not 0 <= value <= 1:
        raise ValueError(f"{text} is outside [0,1]; it is a distance between images in [0,1], such as 8/255")
    return value


def format_pixel_distance(distance: float) -> str:
    """Return a distance between [0,1] images in levels of 8 bits, such as `8/255`."""
    return f"{255 * distance:.3g}/255"


def to_model_units(distance: float) -> float:
    """Return a distance between [0,1] images as a distance between [-1,1] images, which is twice as large."""
    return distance * PIXEL_RANGE


def to_unit_range(images: Tensor) -> Tensor:
    """Return images in [-1,1], of any shape, as images in [0,1]."""
    return (images - PIXEL_MIN) / PIXEL_RANGE


def to_model_range(images: Tensor) -> Tensor:
    """Return images in [0,1], of any shape, as images in [-1,1]."""
    return images * PIXEL_RANGE + PIXEL_MIN


def frames_of(images: Tensor) -> Tensor:
    """Return clips `[N,C,T,H,W]` as their frames `[N*T,C,H,W]`, clip by clip; images `[N,C,H,W]` as they are."""
    return images if images.ndim == 4 else images.transpose(1, 2).flatten(0, 1)


def clips_of(frames: Tensor, count: int) -> Tensor:
    """Return frames `[count*T,C,H,W]` as `count` clips `[count,C,T,H,W]`: the inverse of `frames_of`."""
    return frames.unflatten(0, (count, -1)).transpose(1, 2)


def by_frame(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Apply a function of images `[N,C,H,W]` to images, or to the frames of clips `[N,C,T,H,W]`."""
    changed = function(frames_of(images))
    return changed if images.ndim == 4 else clips_of(changed, len(images))


def over_frames(values: Tensor, count: int) -> Tensor:
    """Return the mean over each clip's frames: from `[count*T]` to `[count]`; the values of images as they are."""
    return values.view(count, -1).mean(dim=1)


def on_device(images: Tensor, device: torch.device) -> Tensor:
    """Return images or clips on a device, in channels-last memory, without waiting for the copy."""
    layout = torch.channels_last if images.ndim == 4 else torch.channels_last_3d
    return images.to(device, memory_format=layout, non_blocking=True)


def check_images(images: Tensor, *, clips: bool = False) -> None:
    """Refuse anything but a float batch of images `[N,3,H,W]` in [-1,1]; with `clips`, accept clips `[N,3,T,H,W]` too.

    Raises:
        ValueError: with the shape, dtype or range that was found.
    """
    if (
        images.ndim not in (4, 5 if clips else 4)
        or images.shape[1] != 3
        or not images.is_floating_point()
        or images.numel() == 0
    ):
        raise ValueError(f"expected float images [N,3,H,W], got {images.dtype} {tuple(images.shape)}")
    low, high = images.aminmax()
    # Half-precision rounding of an image at the border may pass it by one part in 256. NaN fails both comparisons.
    if not (low >= PIXEL_MIN - 4e-3 and high <= PIXEL_MAX + 4e-3):
        raise ValueError(f"expected images in [-1,1], got values from {low:.3f} to {high:.3f}")


def from_pil(image: Image.Image) -> Tensor:
    """Return an RGB image as a `[3,H,W]` float32 tensor in [-1,1]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return to_model_range(pixels.permute(2, 0, 1).float() / 255.0)


def to_pil(image: Tensor) -> Image.Image:
    """Return a `[3,H,W]` tensor in [-1,1] as an RGB image; values beyond the range are clipped."""
    pixels = to_unit_range(image.detach().float()).clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
