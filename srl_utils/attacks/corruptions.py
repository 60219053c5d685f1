"""Corruptions: changes of an image that need no gradient, each at five severities.

Source of the severities: ImageNet-C, Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations", ICLR 2019, as in the authors' `make_imagenet_c.py`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from srl_utils.attacks.draws import Generators, draw, draw_normal
from srl_utils.images.pixels import (
    PIXEL_MAX,
    PIXEL_MIN,
    by_frame,
    from_pil,
    to_model_range,
    to_model_units,
    to_pil,
    to_unit_range,
)

SEVERE = re.compile(r"([a-z-]+?)-([1-5])")
BLUR_REACH = 4.0  # standard deviations after which the kernel is cut off, as in skimage and ImageNet-C


def gaussian_noise(clean: Tensor, sigma: float, *, generators: Generators | None = None) -> Tensor:
    """Add white noise of standard deviation `sigma` (units of a [0,1] image) to `clean` `[N,3,H,W]`; clip to [-1,1].

    Image i draws from `generators[i]`; see `draws.draw`.
    """
    noise = draw_normal(generators, like=clean)
    return (clean + to_model_units(sigma) * noise).clamp(PIXEL_MIN, PIXEL_MAX)


def speckle_noise(clean: Tensor, sigma: float, *, generators: Generators | None = None) -> Tensor:
    """Add noise of standard deviation `sigma` times the value in [0,1] to `clean` `[N,3,H,W]`; clip to [-1,1].

    Image i draws from `generators[i]`; see `draws.draw`.
    """
    noise = draw_normal(generators, like=clean)
    return (clean + sigma * (clean - PIXEL_MIN) * noise).clamp(PIXEL_MIN, PIXEL_MAX)


def salt_and_pepper(clean: Tensor, share: float, *, generators: Generators | None = None) -> Tensor:
    """Set a random `share` of the values of `clean` `[N,3,H,W]` to -1 or 1, both equally likely.

    Image i draws from `generators[i]`; see `draws.draw`.
    """
    drawn = draw(torch.rand, clean.shape[1:], generators, like=clean)
    peppered = torch.where(drawn < share / 2, PIXEL_MIN, clean)
    return torch.where(drawn >= 1 - share / 2, PIXEL_MAX, peppered)


def gaussian_blur(clean: Tensor, sigma: float) -> Tensor:
    """Convolve `clean` `[N,3,H,W]` with a Gaussian of standard deviation `sigma` pixels; border pixels are repeated."""
    reach = int(BLUR_REACH * sigma + 0.5)
    size = 2 * reach + 1
    padded = transforms.pad(clean, [reach], padding_mode="edge")
    # One axis after the other: a kernel of 49x49 pixels for the largest sigma would cost 25 times as much.
    blurred = transforms.gaussian_blur(transforms.gaussian_blur(padded, [size, 1], sigma), [1, size], sigma)
    # Rounding may leave [-1,1] slightly.
    return transforms.center_crop(blurred, list(clean.shape[2:])).clamp(PIXEL_MIN, PIXEL_MAX)


def jpeg(clean: Tensor, quality: int) -> Tensor:
    """Write `clean` `[N,3,H,W]` in [-1,1] as 8-bit JPEG and read it again; `quality` is Pillow's, 1 to 95."""
    return _through_file(clean, "JPEG", quality)


def webp(clean: Tensor, quality: int) -> Tensor:
    """Write `clean` `[N,3,H,W]` in [-1,1] as 8-bit lossy WebP and read it again; `quality` is 0 to 100."""
    return _through_file(clean, "WEBP", quality)


def resize(clean: Tensor, scale: float) -> Tensor:
    """Resize `clean` `[N,3,H,W]` to `scale` times its sides, rounded down, and back: bilinear with antialiasing."""
    sides = list(clean.shape[2:])
    small = _bilinear(clean, [max(int(side * scale), 1) for side in sides])
    return _bilinear(small, sides).clamp(PIXEL_MIN, PIXEL_MAX)


def pixelate(clean: Tensor, scale: float) -> Tensor:
    """Shrink `clean` `[N,3,H,W]` in [-1,1] to `scale` times its sides, rounded down, and enlarge it, as 8-bit images.

    Both steps have Pillow's box filter.
    """
    rows = []
    for picture in map(to_pil, clean):
        sides = (max(int(picture.width * scale), 1), max(int(picture.height * scale), 1))
        small = picture.resize(sides, Image.Resampling.BOX)
        rows.append(from_pil(small.resize(picture.size, Image.Resampling.BOX)))
    return torch.stack(rows).to(clean)


def brightness(clean: Tensor, added: float) -> Tensor:
    """Add `added` to the value (HSV, in [0,1]) of each pixel of `clean` `[N,3,H,W]`; clip it, keep hue and saturation."""
    unit = to_unit_range(clean)
    value = unit.amax(dim=1, keepdim=True)
    brighter = (value + added).clamp(0, 1)
    # At a given hue and saturation, the channels are proportional to the value. Black is a grey of value 0.
    return to_model_range(torch.where(value > 0, unit * (brighter / value.clamp_min(1e-12)), brighter))


def contrast(clean: Tensor, factor: float) -> Tensor:
    """Multiply the distance of `clean` `[N,3,H,W]` in [-1,1] from each channel's mean by `factor`."""
    means = clean.mean(dim=(2, 3), keepdim=True)
    return (means + factor * (clean - means)).clamp(PIXEL_MIN, PIXEL_MAX)


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
    """A corruption at five severities.

    Attributes:
        name: its name in the results.
        severities: the second argument of `function` at each severity, from mild to severe.
        function: changes images `[N,3,H,W]` in [-1,1].
        draws: whether `function` is random and takes `generators`.
    """

    name: str
    severities: tuple[float, ...]
    function: Callable[..., Tensor]
    draws: bool = False

    def apply(self, clean: Tensor, severity: int, generators: Generators | None = None) -> Tensor:
        """Return the corrupted images or clips, in [-1,1], with the device and dtype of `clean`.

        Args:
            clean: `[N,3,H,W]`, or clips `[N,3,T,H,W]`, float in [-1,1].
            severity: 1 to 5.
            generators: one CPU generator per image; None draws from PyTorch's global generator. Corruptions that are
                not random ignore them.

        Raises:
            ValueError: if `severity` is not 1 to 5, or if the number of generators is not the number of images.
        """
        if severity not in range(1, len(self.severities) + 1):
            raise ValueError(f"severity must be 1 to {len(self.severities)}, got {severity}")
        strength = self.severities[severity - 1]
        if self.draws:
            return self.function(clean, strength, generators=generators)
        return by_frame(lambda frames: self.function(frames, strength), clean)


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
        # ImageNet-C `speckle_noise`, one of its extra corruptions.
        Corruption(name="speckle-noise", severities=(0.15, 0.2, 0.35, 0.45, 0.6), function=speckle_noise, draws=True),
        # ImageNet-C `gaussian_blur`, one of its extra corruptions, for images of 224 pixels.
        Corruption(name="gaussian-blur", severities=(1, 2, 3, 4, 6), function=gaussian_blur),
        # ImageNet-C `jpeg_compression`.
        Corruption(name="jpeg", severities=(25, 18, 15, 10, 7), function=jpeg),
        # ImageNet-C `pixelate`.
        Corruption(name="pixelate", severities=(0.6, 0.5, 0.4, 0.3, 0.25), function=pixelate),
        # ImageNet-C `brightness`.
        Corruption(name="brightness", severities=(0.1, 0.2, 0.3, 0.4, 0.5), function=brightness),
        # ImageNet-C `contrast`.
        Corruption(name="contrast", severities=(0.4, 0.3, 0.2, 0.1, 0.05), function=contrast),
        # ImageNet-C has no WebP; these are JPEG's numbers on WebP's scale.
        Corruption(name="webp", severities=(25, 18, 15, 10, 7), function=webp),
        # The scales of ImageNet-C's `pixelate`, with a bilinear filter in place of its box filter.
        Corruption(name="resize", severities=(0.6, 0.5, 0.4, 0.3, 0.25), function=resize),
    )
}


def severity_of(name: str) -> tuple[str, int] | None:
    """Return the corruption and the severity that a name such as `jpeg-3` stands for; None for another name."""
    match = SEVERE.fullmatch(name)
    return (match[1], int(match[2])) if match and match[1] in CORRUPTIONS else None
