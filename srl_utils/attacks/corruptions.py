"""Corruptions: changes of an image that no gradient is needed for, and the severities they are measured at.

Source of the severities: ImageNet-C, Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations", ICLR 2019, as in the authors' `make_imagenet_c.py`.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from srl_utils.attacks.draws import Generators, draw, draw_normal
from srl_utils.images.pixels import PIXEL_MAX, PIXEL_MIN, from_pil, to_model_units, to_pil

BLUR_REACH = 4.0  # deviations after which the kernel is cut off, as in skimage and so in ImageNet-C


def gaussian_noise(clean: Tensor, sigma: float, *, generators: Generators) -> Tensor:
    """`clean` `[N,3,H,W]` in [-1,1] with white noise of standard deviation `sigma` (units of a [0,1] image).

    The result is clipped to [-1,1]; image i draws from `generators[i]`, on the CPU.
    """
    noise = draw_normal(generators, like=clean)
    return (clean + to_model_units(sigma) * noise).clamp(PIXEL_MIN, PIXEL_MAX)


def salt_and_pepper(clean: Tensor, share: float, *, generators: Generators) -> Tensor:
    """`clean` `[N,3,H,W]` in [-1,1] with a `share` of its values, each for itself, set to -1 or 1 with even chances.

    Image i draws from `generators[i]`, on the CPU.
    """
    drawn = draw(torch.rand, clean.shape[1:], generators, like=clean)
    peppered = torch.where(drawn < share / 2, PIXEL_MIN, clean)
    return torch.where(drawn >= 1 - share / 2, PIXEL_MAX, peppered)


def gaussian_blur(clean: Tensor, sigma: float) -> Tensor:
    """`clean` `[N,3,H,W]` folded with a Gaussian of deviation `sigma` pixels; beyond the border its pixels repeat."""
    reach = int(BLUR_REACH * sigma + 0.5)
    size = 2 * reach + 1
    padded = transforms.pad(clean, [reach], padding_mode="edge")
    # One axis after the other: a kernel of 49x49 for the largest deviation would cost 25 times as much.
    blurred = transforms.gaussian_blur(transforms.gaussian_blur(padded, [size, 1], sigma), [1, size], sigma)
    # Rounding may pass white or black by a hair.
    return transforms.center_crop(blurred, list(clean.shape[2:])).clamp(PIXEL_MIN, PIXEL_MAX)


def jpeg(clean: Tensor, quality: int) -> Tensor:
    """`clean` `[N,3,H,W]` in [-1,1] rounded to 8 bits, written as JPEG and read again; `quality` is Pillow's, 1 to 95."""
    return _through_file(clean, "JPEG", quality)


def webp(clean: Tensor, quality: int) -> Tensor:
    """`clean` `[N,3,H,W]` in [-1,1] rounded to 8 bits, written as lossy WebP and read again; `quality` is 0 to 100."""
    return _through_file(clean, "WEBP", quality)


def resize(clean: Tensor, scale: float) -> Tensor:
    """`clean` `[N,3,H,W]` brought to `scale` times its sides (rounded down) and back, bilinear with antialiasing."""
    sides = list(clean.shape[2:])
    small = _bilinear(clean, [max(int(side * scale), 1) for side in sides])
    return _bilinear(small, sides).clamp(PIXEL_MIN, PIXEL_MAX)


def _bilinear(images: Tensor, sides: list[int]) -> Tensor:
    return transforms.resize(images, sides, InterpolationMode.BILINEAR, antialias=True)


def _through_file(clean: Tensor, file_format: str, quality: int) -> Tensor:
    rows = []
    for image in clean:
        file = io.BytesIO()
        to_pil(image).save(file, file_format, quality=quality)
        rows.append(from_pil(Image.open(file).convert("RGB")))
    return torch.stack(rows).to(clean)


@dataclass(frozen=True, kw_only=True)
class Corruption:
    """A corruption and its five strengths."""

    name: str
    severities: tuple[float, ...]
    """What `function` gets as its second argument, from mild to severe."""
    function: Callable[..., Tensor]
    draws: bool = False
    """Whether it is random: then `function` gets `generators`."""

    def apply(self, clean: Tensor, severity: int, generators: Generators | None = None) -> Tensor:
        """The corrupted images `[N,3,H,W]` in [-1,1], of the device and dtype of `clean`.

        Args:
            clean: `[N,3,H,W]` float in [-1,1].
            severity: 1 to 5.
            generators: one CPU generator per image; only the random corruptions need and use them.

        Raises:
            ValueError: for another severity, or unless a random corruption gets one generator per image.
        """
        if severity not in range(1, len(self.severities) + 1):
            raise ValueError(f"{self.name} has severities 1 to {len(self.severities)}, not {severity}")
        drawn = {"generators": generators} if self.draws else {}
        return self.function(clean, self.severities[severity - 1], **drawn)


CORRUPTIONS: dict[str, Corruption] = {
    corruption.name: corruption
    for corruption in (
        # ImageNet-C `gaussian_noise`.
        Corruption(
            name="gaussian-noise", severities=(0.08, 0.12, 0.18, 0.26, 0.38), function=gaussian_noise, draws=True
        ),
        # ImageNet-C `impulse_noise`.
        Corruption(
            name="salt-and-pepper", severities=(0.03, 0.06, 0.09, 0.17, 0.27), function=salt_and_pepper, draws=True
        ),
        # ImageNet-C `gaussian_blur`, one of its extra corruptions; made for images of 224 pixels.
        Corruption(name="gaussian-blur", severities=(1, 2, 3, 4, 6), function=gaussian_blur),
        # ImageNet-C `jpeg_compression`.
        Corruption(name="jpeg", severities=(25, 18, 15, 10, 7), function=jpeg),
        # ImageNet-C has no WebP: JPEG's numbers, on WebP's own scale of quality.
        Corruption(name="webp", severities=(25, 18, 15, 10, 7), function=webp),
        # The scales of ImageNet-C's `pixelate`, whose box filter is replaced by the bilinear one of resized pictures.
        Corruption(name="resize", severities=(0.6, 0.5, 0.4, 0.3, 0.25), function=resize),
    )
}
