"""Compute image metrics, one value per image, and the interval of their mean."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from srl_utils.images.pixels import frames_of, over_frames, to_unit_range

MAX_PSNR = 100.0
"""In dB. Without it, the PSNR of identical images is infinite, so it cannot be averaged with other images' PSNR."""
SSIM_WINDOW = 11


def psnr(images: Tensor, target: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of each image, `[N]`, in dB, at most `MAX_PSNR`.

    Args:
        images: `[N,3,H,W]` in [-1,1]; values beyond are clipped. For clips `[N,3,T,H,W]`, it is the mean over the frames.
        target: the images to compare with, of the same shape.
    """
    ratio = peak_signal_noise_ratio(_unit(images), _unit(target), data_range=1.0, reduction="none", dim=(1, 2, 3))
    return over_frames(ratio.clamp(max=MAX_PSNR), len(images))


def ssim(images: Tensor, target: Tensor) -> Tensor:
    """Return the structural similarity of each image, `[N]` (Wang et al. 2004, Gaussian window 11, sigma 1.5).

    The mean is over the windows within the image, as in the paper and in scikit-image. The mean of torchmetrics
    includes windows over a mirrored border. Arguments are those of `psnr`.
    """
    _, similarities = structural_similarity_index_measure(
        _unit(images), _unit(target), data_range=1.0, sigma=1.5, reduction="none", return_full_image=True
    )
    border = SSIM_WINDOW // 2
    return over_frames(similarities[..., border:-border, border:-border].flatten(1).mean(dim=1), len(images))


def latent_drift(latents: Tensor, reference_latents: Tensor) -> Tensor:
    """Return |z - z0|^2 / |z0|^2 of each latent, `[N]`: how far it is from one that a diffusion model knows.

    Args:
        latents: z, `[N,C,h,w]`.
        reference_latents: z0, of the same shape.
    """
    difference = (latents - reference_latents).square().flatten(1).sum(dim=1)
    return difference / reference_latents.square().flatten(1).sum(dim=1)


def bootstrap_interval(values: Sequence[float], *, seed: int = 0, resamples: int = 2000) -> tuple[float, float]:
    """Return the 95% percentile-bootstrap interval of the mean of `values`, one value per image.

    A single value is its own interval; `scipy.stats.bootstrap`, otherwise the same, refuses it.
    """
    sample = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, len(sample), size=(resamples, len(sample)))
    low, high = np.quantile(sample[picks].mean(axis=1), (0.025, 0.975))
    return float(low), float(high)


def _unit(images: Tensor) -> Tensor:
    return to_unit_range(frames_of(images.detach()).to(torch.float32)).clamp(0, 1)
