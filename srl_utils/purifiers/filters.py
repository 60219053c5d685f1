"""Purifiers that need no network: files, resizing, noise, and AdverseCleaner's filters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import functional as transforms

from srl_utils.attacks.corruptions import gaussian_noise, jpeg, resize, webp
from srl_utils.purifiers.base import Purifier

BILATERAL_STEPS, BILATERAL_REACH, BILATERAL_SIGMA = 64, 2, 8.0
"""AdverseCleaner's bilateral filter: repetitions, reach in pixels (a window of 5), and both standard deviations: of the
distance in pixels and of the colours in levels of 255."""
GUIDED_STEPS, GUIDED_RADIUS, GUIDED_EPSILON = 4, 4, 16.0
"""AdverseCleaner's guided filter: repetitions, radius in pixels, and regularisation in squared levels of 255."""


def jpeg_file(quality: int) -> Purifier:
    """Return a JPEG file of Pillow's `quality`, 1 to 95; gradients pass straight through."""
    return Purifier(
        name=f"jpeg-{quality}", apply=lambda images, _: straight_through(images, jpeg(images.detach(), quality))
    )


def webp_file(quality: int) -> Purifier:
    """Return a lossy WebP file of Pillow's `quality`, 0 to 100; gradients pass straight through."""
    return Purifier(
        name=f"webp-{quality}", apply=lambda images, _: straight_through(images, webp(images.detach(), quality))
    )


def resizing(scale: float) -> Purifier:
    """Return resizing to `scale` times the sides and back, bilinear with antialiasing."""
    return Purifier(name=f"resize-{scale:g}", apply=lambda images, _: resize(images, scale))


def noise(sigma: float) -> Purifier:
    """Return Gaussian noise of standard deviation `sigma`, in units of a [0,1] image; each call draws anew."""
    return Purifier(
        name=f"noise-{sigma:g}",
        apply=lambda images, generators: gaussian_noise(images, sigma, generators=generators),
        random=True,
    )


def adverse_cleaner() -> Purifier:
    """Return AdverseCleaner: repeated bilateral filters, and guided ones that bring the image's edges back.

    Source: the code of lllyasviel/AdverseCleaner, which filters 8-bit images by OpenCV.
    """
    return Purifier(name="adverse-cleaner", apply=lambda images, _: clean_adversely(images))


def straight_through(images: Tensor, changed: Tensor) -> Tensor:
    """Return `changed` with the gradient of `images`, as if the change were none (Athalye et al., ICML 2018: BPDA)."""
    return images + (changed - images).detach()


def clean_adversely(images: Tensor) -> Tensor:
    """Return images `[N,3,H,W]` in [-1,1] after AdverseCleaner's filters."""
    height, width = images.shape[2:]
    missing = [max(GUIDED_RADIUS + 1 - side, 0) for side in (width, height)]  # a smaller image cannot be mirrored
    levels = (F.pad(images, (0, missing[0], 0, missing[1]), mode="replicate") + 1) * 127.5
    smooth = levels
    for _ in range(BILATERAL_STEPS):
        smooth = bilateral(smooth, reach=BILATERAL_REACH, colour_sigma=BILATERAL_SIGMA, space_sigma=BILATERAL_SIGMA)
    for _ in range(GUIDED_STEPS):
        smooth = guided(levels, smooth, radius=GUIDED_RADIUS, epsilon=GUIDED_EPSILON)
    return smooth[..., :height, :width] / 127.5 - 1


def bilateral(images: Tensor, *, reach: int, colour_sigma: float, space_sigma: float) -> Tensor:
    """Average each pixel with those around it that are near and of a similar colour.

    As OpenCV does, colours differ by the sum of the channels' absolute differences, the window is round, and borders are
    mirrored without repeating the edge.

    Args:
        images: `[N,C,H,W]`.
        reach: the window's radius in pixels.
        colour_sigma: standard deviation of the colours, in units of the images.
        space_sigma: standard deviation of the distance, in pixels.
    """
    height, width = images.shape[2:]
    padded = F.pad(images, [reach] * 4, mode="reflect")
    total, weights = torch.zeros_like(images), torch.zeros_like(images[:, :1])
    for row in range(-reach, reach + 1):
        for column in range(-reach, reach + 1):
            square = row**2 + column**2
            if square > reach**2:
                continue
            moved = padded[..., reach + row : reach + row + height, reach + column : reach + column + width]
            difference = (moved - images).abs().sum(dim=1, keepdim=True)
            weight = torch.exp(-square / (2 * space_sigma**2) - difference.square() / (2 * colour_sigma**2))
            total, weights = total + weight * moved, weights + weight
    return total / weights


def guided(guide: Tensor, images: Tensor, *, radius: int, epsilon: float) -> Tensor:
    """Return images as locally linear functions of all channels of a guide: the guided filter.

    Source: He, Sun and Tang, "Guided Image Filtering", PAMI 2013, equations 19 to 21. As OpenCV does, borders are mirrored
    with the edge repeated.

    Args:
        guide: `[N,3,H,W]`.
        images: `[N,C,H,W]`, what is filtered.
        radius: of the square window, in pixels.
        epsilon: regularisation, in squared units of the guide.
    """

    def mean(values: Tensor) -> Tensor:
        padded = transforms.pad(values, [radius], padding_mode="symmetric")
        return F.avg_pool2d(padded, 2 * radius + 1, stride=1)

    channels = guide.shape[1]
    guide_mean, image_mean = mean(guide), mean(images)
    covariance = mean((guide[:, :, None] * guide[:, None]).flatten(1, 2)).unflatten(1, (channels, channels))
    covariance = covariance - guide_mean[:, :, None] * guide_mean[:, None]
    crossed = mean((guide[:, :, None] * images[:, None]).flatten(1, 2)).unflatten(1, (channels, images.shape[1]))
    crossed = crossed - guide_mean[:, :, None] * image_mean[:, None]
    regularised = covariance.permute(0, 3, 4, 1, 2) + epsilon * torch.eye(channels).to(guide)
    slopes = torch.linalg.solve(regularised, crossed.permute(0, 3, 4, 1, 2)).permute(0, 3, 4, 1, 2)
    offsets = image_mean - (slopes * guide_mean[:, :, None]).sum(dim=1)
    averaged = mean(slopes.flatten(1, 2)).unflatten(1, (channels, images.shape[1]))
    return (averaged * guide[:, :, None]).sum(dim=1) + mean(offsets)
